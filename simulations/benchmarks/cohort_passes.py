"""One measured way to train slots on one device: tokens a second, and the allocator's peak.

A run is timed from the first forward pass of its first step to that of its last, so without loading
factors and without the passes that look at the loss before and after. The base is random, of a
Llama's shape, bfloat16 on CUDA.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import nn

from flexlora.aggregation import make_method
from flexlora.aggregation.engine.method import State
from flexlora.aggregation.engine.starts import Factoring, Start
from flexlora.aggregation.engine.state import GlobalChange
from flexlora.data.collation import Example
from flexlora.lora.ranks import RankClass
from flexlora.seeds import generator
from flexlora.training.local import TrainSettings, train
from flexlora.training.models import pick_device
from flexlora.training.slots import SlotModel
from flexlora.wire.jobs import TrainJob

__all__ = [
    "SHAPES",
    "Measured",
    "Sweep",
    "pass_times",
    "peft_pass",
    "random_base",
    "slot_pass",
    "starts_of",
]

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "0.5b": {
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    },
    "1b": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
}


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """``counts`` are the K, ``slot_rows`` the b; ranks are dealt to the slots in turn."""

    device: str = "cpu"
    shape: str = "0.5b"
    counts: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    slot_rows: tuple[int, ...] = (1, 2, 4)
    length: int = 256
    steps: int = 8
    ranks: tuple[int, ...] = (2, 4, 8, 16)
    seed: int = 0

    @property
    def settings(self) -> TrainSettings:
        return TrainSettings(max_steps=self.steps, lr_scheduler_type="constant", seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Tokens a second, and on CUDA the peak of allocated bytes."""

    rate: float
    peak_bytes: float


def random_base(sweep: Sweep) -> Any:
    """A frozen Llama of the sweep's shape, its matrices drawn from the seed."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    device = pick_device(sweep.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape: dict[str, Any] = {**SHAPES[sweep.shape], "max_position_embeddings": sweep.length}
    config = LlamaConfig(**shape)
    # What the constructor draws is replaced below; the caller's own draws must not move.
    with torch.device(device), torch.random.fork_rng():
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    draws = generator(sweep.seed, "sweep-base")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=draws))
    return model.requires_grad_(False).eval()


def starts_of(slots: SlotModel, sweep: Sweep) -> list[Start]:
    """What a server sends each rank in round 1, in the order in which ranks are dealt."""
    state = State(round=0, change=GlobalChange.zero(slots.shapes, torch.float32))
    method, factoring = make_method("flexlora"), Factoring(alpha=16.0, seed=sweep.seed)
    return [method.start(state, RankClass.of(rank), factoring) for rank in sweep.ranks]


def slot_pass(
    slots: SlotModel,
    starts: Sequence[Start],
    sweep: Sweep,
    count: int,
    batch: int,
    micro: int = 0,
) -> Measured:
    """``count`` slots of ``batch`` rows each, ``starts`` dealt to them in turn."""
    jobs = [
        TrainJob(
            client_id=f"client_{k:03d}",
            server_round=1,
            num_server_rounds=1,
            start=starts[k % len(starts)],
        )
        for k in range(count)
    ]
    examples = [_examples(sweep, job.client_id, batch) for job in jobs]
    sizes = {"per_device_train_batch_size": batch, "micro_batch_size": micro or batch}
    settings = sweep.settings.model_copy(update=sizes)
    return _measure(
        slots.model,
        lambda: train(slots, jobs, examples, settings),
        steps=sweep.steps,
        tokens_per_step=count * batch * sweep.length,
    )


def peft_pass(model: Any, sweep: Sweep, batch: int) -> Measured:
    """Stock steps on ``batch`` rows: the model's own loss, fused AdamW, clipped gradients."""
    rows = _examples(sweep, "peft", batch)
    input_ids = torch.tensor([row.input_ids for row in rows], device=model.device)
    labels = input_ids.clone()
    labels[:, : rows[0].prompt_length] = -100
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=sweep.settings.learning_rate, fused=True)

    def steps() -> None:
        for _ in range(sweep.steps):
            model(input_ids=input_ids, labels=labels).loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    tokens = batch * sweep.length
    return _measure(model, steps, steps=sweep.steps, tokens_per_step=tokens)


def _examples(sweep: Sweep, name: str, count: int) -> list[Example]:
    """Random rows of full length whose second half is the answer."""
    vocab, draws = SHAPES[sweep.shape]["vocab_size"], generator(sweep.seed, "sweep-rows", name)
    ids = torch.randint(3, vocab, (count, sweep.length), generator=draws).tolist()
    half = sweep.length // 2
    return [Example(input_ids=tuple(r), prompt_length=half, prompt="", answer="") for r in ids]


def _measure(
    model: nn.Module, run: Callable[[], object], *, steps: int, tokens_per_step: int
) -> Measured:
    """The second of two calls of ``run``, which makes ``steps`` steps of equal passes."""
    on_cuda = next(model.parameters()).is_cuda
    run()
    if on_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with pass_times(model) as times:
        run()
    passes = len(times) // steps
    if passes < 1 or len(times) % steps or steps < 2:
        raise RuntimeError(f"{len(times)} passes in {steps} steps, expected as many in each.")
    seconds = median(later - earlier for earlier, later in pairwise(times[::passes]))
    peak = float(torch.cuda.max_memory_allocated()) if on_cuda else 0.0
    return Measured(rate=tokens_per_step / seconds, peak_bytes=peak)


@contextmanager
def pass_times(model: nn.Module) -> Iterator[list[float]]:
    """When each forward pass with gradients began, the device idle."""
    times: list[float] = []

    def note(*_: object) -> None:
        if torch.is_grad_enabled():
            if next(model.parameters()).is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter())

    handle = model.register_forward_pre_hook(note)
    try:
        yield times
    finally:
        handle.remove()
