"""What this machine can train, for ``flexlora client init``: run the kernels, count the bytes.

The planner chooses among the quantizations whose kernels ran. It prefers a base that is rounded
less, and takes a smaller one only where a larger trained rank fits with it (``planner.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flexlora.config.paths import resolve_name
from flexlora.config.sections import Data, Model, Train
from flexlora.data.clients import RowCount, count_rows
from flexlora.data.rows import Row
from flexlora.errors import UserError
from flexlora.planning.devices import CPU_RUNTIME, CUDA_RUNTIME
from flexlora.planning.model_config import read_shape
from flexlora.planning.planner import Choice, Request, make_plan, needed_bytes
from flexlora.planning.probing import Probe, device_name, free_bytes, probe, require
from flexlora.planning.shapes import ModelShape
from flexlora.training.models import pick_device
from flexlora.training.tokenizer import load_tokenizer
from flexlora.units import human_bytes, parse_bytes

__all__ = ["MachinePlan", "count_train_rows", "plan_machine"]


@dataclass(frozen=True, kw_only=True)
class MachinePlan:
    """The content of ``findings.json``."""

    device: str
    device_name: str
    on_card: bool
    memory_bytes: int
    memory_limit: str
    kernels: tuple[str, ...]
    absent: tuple[str, ...]
    quantization: str
    dtype: str
    rank: int
    needed_bytes: int
    reason: str

    def values(self) -> dict[str, str]:
        """Values for the templates."""
        default = Model().dtype
        absent = f"; not: {', '.join(self.absent)}" if self.absent else ""
        return {
            "device": self.device,
            "device_name": self.device_name,
            "free": human_bytes(self.memory_bytes),
            "kernels": f"these ran here: {', '.join(self.kernels) or 'none'}{absent}",
            "quantization": self.quantization,
            "sets": f"--set model.dtype={self.dtype} " if self.dtype != default else "",
            "fits": (
                f"rank {self.rank} ({self.reason}), {human_bytes(self.needed_bytes)} "
                "with the margin"
            ),
        }


def count_train_rows(rows: Sequence[Row], *, model: str) -> RowCount:
    """How many rows a run of the default length would train on: what the trainer reports too.

    Raises:
        UserError: a model whose tokenizer cannot be read, or none of the rows fits.
    """
    source, length = resolve_name(model), _max_length(read_shape(model))
    tokenizer = load_tokenizer(source, model, local_files_only=Path(source).is_dir())
    count = count_rows(rows, tokenizer=tokenizer, template=Data().template, max_length=length)
    if not count.examples:
        raise UserError(
            f"--data: none of the {count.dropped} train rows fits in {length} tokens with its "
            "answer, so nothing can be trained here; shorten the answers."
        )
    return count


def _max_length(shape: ModelShape) -> int:
    return min(Train().max_length, shape.max_positions)


def plan_machine(
    *, model: str, device: str, quantization: str, memory_limit: str, num_examples: int
) -> MachinePlan:
    """Run the kernels on ``device``, and plan ``model`` with those that ran.

    Raises:
        UserError: a missing device, a quantization that does not run here, a model that cannot be
            planned for or does not fit at any rank.
    """
    where = pick_device(device)
    if quantization:
        require(quantization, where, key="--quantization")
    seen, on_card = probe(where), where.type == "cuda"
    memory = free_bytes(where)
    if memory_limit:
        memory = min(memory, parse_bytes(memory_limit, "--memory-limit"))
    choice = _plan(model, seen, on_card, memory, quantization, num_examples)
    chosen = choice.plan.quantization
    return MachinePlan(
        device=where.type if device != "auto" else "auto",
        device_name=device_name(where),
        on_card=on_card,
        memory_bytes=memory,
        memory_limit=memory_limit,
        kernels=seen.runs,
        absent=seen.absent,
        quantization=chosen,
        dtype=choice.plan.dtype,
        rank=choice.plan.rank,
        needed_bytes=needed_bytes(choice.terms, choice.request),
        reason=choice.reason,
    )


def _plan(
    model: str, seen: Probe, on_card: bool, memory: int, quantization: str, num_examples: int
) -> Choice:
    shape = read_shape(model)
    request = Request(
        memory_bytes=memory,
        max_length=_max_length(shape),
        num_examples=num_examples,
        quantization=quantization,
        bfloat16="bf16" in seen.runs,
        quantizes={"nf4", "8bit", "adamw_8bit"} <= set(seen.runs),
        cuda=on_card,
        unified_memory=not on_card,
        runtime_bytes=CUDA_RUNTIME if on_card else CPU_RUNTIME,
    )
    return make_plan(shape, request)
