"""What every program of the cohort benchmark has to do, and how it reports it.

The rows are tokens already and the batches are drawn: no program tokenises, shuffles or evaluates,
so that what is timed is training and whatever its framework puts around it. A client begins every
round from the same PEFT factors of its rank, those that our server sends in round 1.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file
from torch import Tensor

__all__ = ["Stamps", "TextRow", "Training", "Work", "as_batch", "what_came_back", "write_report"]

TextRow = tuple[list[int], int]  # token ids, and how many of them are the prompt
State = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Training:
    """One client in one round: optimizer steps, answer tokens, mean loss over the steps."""

    server_round: int
    client_id: str
    steps: int
    tokens: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class Work:
    """``plan[round - 1][client_id]`` lists the rows of each step, as indices into ``rows``."""

    folder: str
    model: str
    ranks: dict[str, int]
    rows: dict[str, list[TextRow]]
    plan: list[dict[str, list[list[int]]]]
    alpha: float
    learning_rate: float
    adam_epsilon: float
    max_grad_norm: float

    @property
    def clients(self) -> list[str]:
        return sorted(self.ranks)

    @property
    def num_rounds(self) -> int:
        return len(self.plan)

    def batches(self, server_round: int, client_id: str) -> list[list[TextRow]]:
        """The rows of each step of one client in one round."""
        rows = self.rows[client_id]
        return [[rows[i] for i in step] for step in self.plan[server_round - 1][client_id]]

    def answer_tokens(self, server_round: int, client_id: str) -> int:
        """Tokens with a loss in all steps together."""
        steps = self.batches(server_round, client_id)
        return sum(len(ids) - prompt for step in steps for ids, prompt in step)

    def start(self, rank: int) -> dict[str, Tensor]:
        """The factors that a client of this rank begins with, by PEFT's names."""
        return load_file(Path(self.folder) / f"rank_{rank}" / "adapter_model.safetensors")

    def write(self) -> None:
        (Path(self.folder) / "work.json").write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, folder: str | Path) -> Work:
        return cls(**json.loads((Path(folder) / "work.json").read_text(encoding="utf-8")))


def as_batch(rows: Sequence[TextRow]) -> dict[str, Tensor]:
    """Right-padded ``input_ids``, ``attention_mask`` and ``labels``, as the stock collators do."""
    width = max(len(ids) for ids, _ in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.int64)
    attention_mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, -100)
    for row, (ids, prompt_length) in enumerate(rows):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
        labels[row, prompt_length : len(ids)] = torch.tensor(ids[prompt_length:])
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def what_came_back(work: Work, replies: Mapping[str, State]) -> dict[str, object]:
    """Whether the factors of all clients are numbers, and the smallest change that any made."""
    changes, finite = [], True
    for client_id, state in replies.items():
        start = work.start(work.ranks[client_id])
        if start.keys() != state.keys():
            raise RuntimeError(f"client {client_id} sent {len(state)} arrays, not {len(start)}.")
        finite &= all(bool(tensor.isfinite().all()) for tensor in state.values())
        changes.append(max(float((state[k] - start[k]).abs().max()) for k in start))
    return {"finite": finite, "moved": min(changes)}


class Stamps:
    """Marks before round 1 and at the end of each round: the clock, and the CPU seconds so far.

    CPU seconds are those of this process and of all below it, which a busy machine does not change
    much.
    """

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def mark(self) -> None:
        self.wall.append(time.time())
        here = psutil.Process()
        total = 0.0
        for process in (here, *here.children(recursive=True)):
            with suppress(psutil.Error):
                used = process.cpu_times()
                total += used.user + used.system
        self.cpu.append(total)


def write_report(
    path: str | Path, stamps: Stamps, trainings: Iterable[Training], **others: object
) -> None:
    """What a program did, for ``cohort_runs`` to read."""
    done = [asdict(training) for training in trainings]
    report = {"stamps": stamps.wall, "cpu_stamps": stamps.cpu, "trainings": done, **others}
    Path(path).write_text(json.dumps(report), encoding="utf-8")
