"""The process that holds all stub nodes of a case.

    python -m flexlora.simulations.benchmarks.fleet_stubs ADDRESS CASE_AS_JSON HOME

It says by one line of JSON that all nodes are in, answers every line of its standard input by one
with what the nodes have done so far, and ends when that input does.
"""

from __future__ import annotations

import json
import logging
import ssl
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from flexlora.simulations.benchmarks.fleet_case import Answers, FleetCase, FleetNode
from flexlora.simulations.benchmarks.fleet_link import SlowLink
from flexlora.simulations.benchmarks.fleet_running import RunningFleet

__all__ = ["main"]

ENTER_SECONDS = 900.0


def main(arguments: Sequence[str]) -> None:
    """All nodes of a case until standard input ends."""
    address, home = arguments[0], Path(arguments[2])
    case = FleetCase.from_json(arguments[1])
    logging.getLogger("flwr").setLevel(logging.WARNING)
    answers = Answers(case.config(home))
    tls = ssl.create_default_context(cafile=str(home / "ca.crt")) if case.tls else None
    with ExitStack() as stack:
        addresses = [address] * case.nodes
        if case.delay_ms or case.bytes_per_second:
            links = [
                SlowLink(address, case.delay_ms / 1000, case.bytes_per_second)
                for _ in range(case.nodes)
            ]
            addresses = [stack.enter_context(link).address for link in links]
        nodes = [FleetNode(where, place, answers, tls) for place, where in enumerate(addresses)]
        fleet = stack.enter_context(RunningFleet(nodes, spread_seconds=_spread(case.nodes)))
        began = time.monotonic()
        fleet.entered(ENTER_SECONDS)
        _say({"enter_seconds": time.monotonic() - began})
        for _ in sys.stdin:
            _say(_done(nodes))


def _spread(nodes: int) -> float:
    """Everybody asks at a moment of its own; a thousand are not registered in a breath."""
    return max(3.0, nodes / 15)


def _done(nodes: Sequence[FleetNode]) -> dict[str, Any]:
    """Sums over all nodes so far."""
    requests: Counter[str] = Counter()
    answered: Counter[str] = Counter()
    for node in nodes:
        requests += node.connection.requests
        answered += node.answered
    refusals = [str(refusal) for node in nodes for refusal in node.refusals]
    return {
        "requests": dict(requests),
        "answered": dict(answered),
        "bytes_up": sum(node.connection.bytes_sent for node in nodes),
        "bytes_down": sum(node.connection.bytes_received for node in nodes),
        "retries": sum(node.connection.retries for node in nodes),
        "refusals": len(refusals),
        "refusal": refusals[0] if refusals else "",
        "cpu_seconds": time.process_time(),
    }


def _say(values: dict[str, Any]) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
