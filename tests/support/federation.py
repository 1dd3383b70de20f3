"""Small federations for the tests of the engine, the server and the commands.

``small(...)`` is a configuration of a second; ``TamperingGrid`` lets one client's replies go wrong
on their way; the rest reads run folders and starts the command as a process of its own.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from flwr.app import MessageType

from flexlora.clients.messages import decode_train_job
from flexlora.clients.worker import Worker
from flexlora.config.resolve import Config
from flexlora.lora.peft_folder import load_adapter
from flexlora.runs.folder import RunFolder
from flexlora.server.app import federate
from flexlora.server.observing.observer import Observer
from flexlora.server.transport.messages import decode_train_result
from flexlora.simulations.engine.cohorts import CohortLimits
from flexlora.simulations.engine.grid import InProcessGrid
from paths import ROOT
from spelled import of_names

SMOKE = ROOT / "simulations" / "scenarios" / "smoke.toml"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

SMALL = {
    "clients.count": 4,
    "population.examples": "lognormal:48:0.4",  # few to encode, and unequal
    "method.name": "flexlora",
    "num-server-rounds": 1,
    "fraction-train": 1.0,
    "ranks.tiers": "2,4",
    "ranks.shares": "equal",
    "lora.target-modules": "q_proj,v_proj",
    "train.max-steps": 2,
    "train.max-length": 128,
    "train.per-device-train-batch-size": 2,
    "eval.max-examples": 1,
    "eval.generate": "never",
    "engine.threads": 1,
}


def small(**changes):
    """``SMALL`` as a configuration; keyword names spell ``.`` as ``__`` and ``-`` as ``_``."""
    return Config.of(SMALL).with_values(of_names(**changes))


def nobody_joins(config, out, **more):
    """The run of a federation whose nodes do not come; ``simulate`` would refuse it beforehand."""
    grid = InProcessGrid(Worker(config), limits=CohortLimits(clients=4), wire_dtype="float32")
    waiting = config.with_values({"server.min-nodes": 9, "server.wait-seconds": 0.0})
    return federate(grid, waiting, out, **more)


def as_sets(config):
    """The values of ``config`` that are not defaults, as arguments of the command."""
    changed = config.changed()
    spelled = (f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in changed.items())
    return [word for item in spelled for word in ("--set", item)]


def command(*arguments, **options):
    """``flexlora ARGUMENTS`` as a process of its own, not yet waited for."""
    return subprocess.Popen(
        [sys.executable, "-m", "flexlora.commands.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **ONE_THREAD, **options.pop("env", {})},
        **options,
    )


def finished(process, timeout=600):
    """``(exit status, stdout, stderr)`` of ``command(...)``; a process that hangs is killed."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"still running after {timeout} s\n{out}\n{err}") from None
    return process.returncode, out, err


def federation(grid, config, folder, **options):
    """One run over ``grid``: its strategy, and its run folder ``folder``."""
    return federate(grid, config, Path(folder), **options), RunFolder(folder)


def rounds(folder):
    """The objects of ``metrics.jsonl``, in order."""
    text = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def untimed(rows):
    """The same rows without what a clock has measured, also one level down (``modules``)."""
    if isinstance(rows, dict):
        kept = (key for key in rows if "seconds" not in key or key.startswith("simulated"))
        return {key: untimed(rows[key]) for key in kept}
    return [untimed(row) for row in rows] if isinstance(rows, list) else rows


def client_rows(folder, server_round=None):
    """The rows of ``clients.csv``, of one round or of all."""
    with (Path(folder) / "clients.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if server_round in (None, int(row["round"]))]


def adapter_bytes(folder):
    """Every file under ``adapters/`` by its relative path."""
    root = Path(folder) / "adapters"
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def global_delta(folder):
    """The dense ``delta_weight`` of every module of ``adapters/global``, in float64."""
    adapter = load_adapter(Path(folder) / "adapters" / "global")
    wide = {name: factors.map(lambda tensor: tensor.double()) for name, factors in adapter.items()}
    return {name: factors.delta_weight() for name, factors in wide.items()}


def state_delta(state):
    """The dense change of every module of a server state."""
    return {name: svd.to_dense().double() for name, svd in state.change.items()}


def relative_gap(first, second):
    """``|first - second| / |second|`` (Frobenius) over all modules together."""
    assert first.keys() == second.keys()
    gap = sum(float((first[name] - second[name]).square().sum()) for name in first)
    size = sum(float(second[name].square().sum()) for name in second)
    assert size > 0, "nothing was learned, so nothing is compared"
    return (gap / size) ** 0.5


def largest_gap(first, second):
    """The largest entry of ``|first - second|`` over all modules, which is bounded in float32.

    AdamW divides by the gradient's size, so an entry near rounding level moves by a good part of a
    step of either sign; relative to a small change that is much, as a number it is not.
    """
    assert any(float(second[name].abs().max()) > 1e-3 for name in second), "nothing was learned"
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def same_bytes(first, second):
    """Whether two server states hold the same numbers, bit for bit."""
    return first.change.keys() == second.change.keys() and all(
        torch.equal(getattr(first.change[name], label), getattr(second.change[name], label))
        for name in first.change
        for label in ("U", "S", "Vh")
    )


class TamperingGrid(InProcessGrid):
    """An ``InProcessGrid`` that hands chosen clients' train replies to ``tamper`` on their way.

    ``tamper(reply, message) -> list of replies``. ``updates`` holds what every client honestly
    replied, decoded, by round and client: what a round without a client is computed from.
    """

    def __init__(self, worker: Worker, *, tamper=None, victims=(), wire_dtype="float32"):
        super().__init__(worker, limits=CohortLimits(clients=1), wire_dtype=wire_dtype)
        self.tamper, self.victims = tamper, set(victims)
        self.sent, self.updates = {}, {}

    def push_messages(self, messages):
        messages = list(messages)
        ids = super().push_messages(messages)
        self.sent |= dict(zip(ids, messages, strict=True))
        return ids

    def pull_messages(self, message_ids):
        for message_id in message_ids:
            for reply in super().pull_messages([message_id]):
                yield from self._on_the_way(self.sent[message_id], reply)

    def _on_the_way(self, message, reply):
        if message.metadata.message_type != MessageType.TRAIN or reply.has_error():
            return [reply]
        client_id = self._client(message)
        server_round = int(message.metadata.group_id)
        start = decode_train_job(message.content, client_id).start.for_client(client_id)
        self.updates[server_round, client_id] = decode_train_result(reply, start)
        return self.tamper(reply, message) if client_id in self.victims else [reply]


class Stopped(Exception):
    """Ends a run from the inside, where a test wants it to end."""


class StopAt(Observer):
    """An observer that raises at one event of one round."""

    def __init__(self, event, server_round, error=Stopped):
        self.event, self.server_round, self.error = event, server_round, error
        self.current = 0

    def round_started(self, server_round, num_rounds, num_clients):
        self.current = server_round
        self._maybe("round_started")

    def replied(self, client_id, outcome, cause, late):
        self._maybe("replied")

    def round_finished(self, metrics):
        self._maybe("round_finished")

    def _maybe(self, event):
        if (event, self.current) == (self.event, self.server_round):
            raise self.error
