"""One measured server in a process of its own: how far its peak grows over a few rounds.

    python -m flexlora.simulations.benchmarks.server_memory_case CASE_AS_JSON

The strategy is the product's (or Flower's FedAvg) and the replies are read and checked as ever.
What is made up is the clients: nobody trains, each sends random factors of the shape it was asked
for (``server_memory_answers.py``). ``PulledGrid`` makes a reply when it is pulled, so that none is
waiting in this process; ``app`` is the same measurement as a ServerApp behind a real SuperLink. The
baseline is the resident set after all imports and a federation of a few small modules.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from flexlora.seeds import numpy_generator
from flexlora.server.observing.observer import LogObserver
from flexlora.server.strategy import FlexLoRAStrategy
from flexlora.simulations.benchmarks.process_memory import peak_bytes, reset_peak, settled_bytes
from flexlora.simulations.benchmarks.server_memory_answers import (
    ECHO,
    FEDAVG,
    Answers,
    ServerCase,
    content_bytes,
)

__all__ = ["PulledGrid", "app", "measure"]

Make = Callable[..., FlexLoRAStrategy]
ECHO_ARRAY = 10**6
PATIENCE = 600.0  # seconds for nodes to come and for one message that is echoed

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Measure behind a SuperLink; the report is a file, since ``flwr run`` returns nothing."""
    case = ServerCase.from_json(Path(str(context.run_config["case"])).read_text(encoding="utf-8"))
    report = Path(str(context.run_config["report"]))
    report.write_text(json.dumps(measure(case, grid)), encoding="utf-8")


def measure(case: ServerCase, grid: Grid, make: Make = FlexLoRAStrategy) -> dict[str, float]:
    """Bytes that the peak grew by, seconds of each round, bytes that came in.

    Raises:
        RuntimeError: a reply that was not counted: then less was measured than is claimed.
    """
    logging.getLogger("flwr").setLevel(logging.WARNING)
    _warm_up()
    own = {FEDAVG: run_fedavg, ECHO: run_echo}.get(case.way)
    baseline = settled_bytes()
    reset_peak()
    seconds = own(case, grid) if own else run_ours(case, grid, make)
    return {
        "baseline": baseline,
        "peak": peak_bytes() - baseline,
        "seconds": sum(seconds) / len(seconds),
        "reply_bytes": case.reply_bytes,
    }


def _warm_up() -> None:
    """Thread pools and kernels that first rounds bring in belong to the baseline."""
    before = {key: vars(TaskIdentity)[key] for key in ("_task_id", "_run_id", "_node_id")}
    for way, start in ((FEDAVG, run_fedavg), ("residual", run_ours)):
        small = ServerCase(way=way, replies=2, rank=2, layers=1)
        start(small, PulledGrid(small))
    for key, value in before.items():  # a ServerApp has one of its own
        setattr(TaskIdentity, key, value)


def run_ours(case: ServerCase, grid: Grid, make: Make = FlexLoRAStrategy) -> list[float]:
    """Seconds of each training round of the product's own strategy."""
    rows = _Rows()
    strategy = make(case.config(), observer=rows)
    strategy.start(grid)
    trained = [row for row in rows.rounds if row["round"] != 0]
    if [row["clients_ok"] for row in trained] != [case.replies] * case.rounds:
        raise RuntimeError(f"not every reply counted, expected {case.replies} a round: {trained}")
    return [float(row["seconds"]) for row in trained]


class _Rows(LogObserver):
    """Keeps the row of every round; refused replies are said on standard error."""

    def __init__(self) -> None:
        super().__init__(logging.getLogger("flexlora.benchmark"))
        self.rounds: list[Mapping[str, Any]] = []

    def round_finished(self, metrics: Mapping[str, Any]) -> None:
        self.rounds.append(metrics)


def run_fedavg(case: ServerCase, grid: Grid) -> list[float]:
    """Seconds a round of Flower's own FedAvg over factors of one rank."""
    arrays = {}
    for name, (out_features, in_features) in case.shapes.items():
        rank = min(case.rank, out_features, in_features)
        sizes = {"lora_A": (rank, in_features), "lora_B": (out_features, rank)}
        for label, size in sizes.items():
            arrays[f"{name}.{label}"] = Array(np.zeros(size, dtype=np.float32))
    strategy = FedAvg(
        fraction_evaluate=0.0, min_train_nodes=case.replies, min_available_nodes=case.replies
    )
    began = time.perf_counter()
    result = strategy.start(grid, ArrayRecord(arrays), num_rounds=case.rounds, timeout=PATIENCE)
    counted = {
        round(float(str(metrics["one"])), 6) for metrics in result.train_metrics_clientapp.values()
    }
    if len(result.train_metrics_clientapp) != case.rounds or counted != {1}:
        raise RuntimeError("FedAvg averaged nothing, expected an average in every round.")
    return [(time.perf_counter() - began) / case.rounds]


def run_echo(case: ServerCase, grid: Grid) -> list[float]:
    """Seconds for one message of the case's bytes to a node and back, unread."""
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.2)
    draw = numpy_generator(0, "echo")
    whole, rest = divmod(case.reply_bytes, ECHO_ARRAY)
    sizes = [ECHO_ARRAY] * whole + ([rest] if rest else [])
    arrays = {f"{k}": Array("uint8", (n,), "raw", draw.bytes(n)) for k, n in enumerate(sizes)}
    record = ArrayRecord(arrays)
    began = time.perf_counter()
    message = Message(RecordDict({ECHO: record}), nodes[0], MessageType.TRAIN)
    (message_id,) = grid.push_messages([message])
    while not (replies := list(grid.pull_messages([message_id]))):
        if time.perf_counter() - began > PATIENCE:
            raise RuntimeError(f"no echo after {PATIENCE:g} s, expected one.")
        time.sleep(0.1)
    came = content_bytes(replies[0].content)
    if came != case.reply_bytes:
        raise RuntimeError(f"{came} bytes came back, expected {case.reply_bytes}.")
    return [time.perf_counter() - began]


class PulledGrid(Grid):
    """Nodes in this process; a reply comes into being when it is pulled, in the case's order."""

    def __init__(self, case: ServerCase) -> None:
        self.case, self.answers = case, Answers(case)
        self._run = Run.create_empty(run_id=1)
        self._open: dict[str, Message] = {}
        self._trained: list[str] = []  # the order in which training ends
        self._pushed = 0
        # Flower's Message reads its sender from the process it is made in.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def get_node_ids(self) -> Iterable[int]:
        return list(range(1, self.case.replies + 1))

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids, trained = [], []
        for message in messages:
            self._pushed += 1
            message_id = f"message-{self._pushed}"
            message.metadata.__dict__["_message_id"] = message_id
            self._open[message_id] = message
            ids.append(message_id)
            if message.metadata.message_type == MessageType.TRAIN:
                trained.append(message_id)
        self._trained += trained[::-1] if self.case.reversed else trained
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        for message_id in message_ids:
            if message_id not in self._open or message_id in self._trained[1:]:
                continue
            self._trained = [waiting for waiting in self._trained if waiting != message_id]
            message = self._open.pop(message_id)
            content = self.answers.to(message, message.metadata.dst_node_id - 1)
            yield Message(content, reply_to=message)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """All replies in one list, as Flower's own grid hands them over."""
        waiting, replies = set(self.push_messages(messages)), list[Message]()
        while waiting:
            came = list(self.pull_messages(waiting))
            replies += came
            waiting -= {reply.metadata.reply_to_message_id for reply in came}
        return replies


if __name__ == "__main__":
    measured = ServerCase.from_json(sys.argv[1])
    print(json.dumps(asdict(measured) | measure(measured, PulledGrid(measured))))
