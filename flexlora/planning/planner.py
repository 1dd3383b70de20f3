"""Plan the best training within a number of bytes: quantization, ranks, batch, checkpointing.

Better means, in this order:

1. a larger trained rank, up to the largest useful one (below);
2. less quantization, and among floats the checkpoint's dtype: a wider one has the same numbers in
   more bytes;
3. a larger carried rank, up to the one asked for; carried in float32 before bfloat16;
4. the optimizer's moments in 32 bits before 8: they last one round only; paged ones only on
   request, since they count in full;
5. no recomputation before a larger micro-batch: checkpointing costs another forward pass, while a
   smaller micro-batch with more gradient accumulation gives the same step.

Ranks are powers of two, so that a federation has few rank classes. A rank is useful if there are
ten examples per direction, the rule of thumb for regression (Peduzzi et al., 1996): with fewer a
direction fits single rows, which averaging over clients cancels. This is a heuristic. If the number
of examples is unknown, the plan stops at rank 64.

Every candidate is a valid configuration.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from flexlora.aggregation.engine.options import CARRIED_RANK, choices
from flexlora.config.resolve import KEYS
from flexlora.config.sections import QUANTIZATIONS, Train
from flexlora.errors import UserError, nearest
from flexlora.planning.memory import MemoryTerms, training_memory
from flexlora.planning.shapes import ModelShape, TrainingPlan

__all__ = ["Choice", "Request", "halved", "make_plan", "needed_bytes", "settings", "useful_rank"]

MARGIN = 0.1  # for fragmentation and errors of the prediction
EXAMPLES_PER_DIRECTION = 10
LARGEST_RANK = 256
USUAL_RANK = 64  # the largest that published LoRA work commonly uses
FLASH = "flash_attention_2"
BITSANDBYTES = ("8bit", "nf4", "adamw_8bit", "paged_adamw_8bit")  # need its kernels


@dataclass(frozen=True, kw_only=True)
class Request:
    """The training and the device to plan for; ``batch`` is in rows per optimizer step.

    ``quantization``, ``optim`` and ``rank`` are chosen where they are "" or 0. ``bfloat16``,
    ``quantizes`` (bitsandbytes runs) and ``cuda`` are capabilities of the device.
    """

    memory_bytes: int
    max_length: int = Train().max_length
    batch: int = Train().per_device_train_batch_size
    num_examples: int | None = None
    quantization: str = ""
    optim: str = ""
    attention: str = "auto"
    rank: int = 0
    carried_rank: int = CARRIED_RANK
    target_modules: str = "all-linear"
    bfloat16: bool = True
    quantizes: bool = True
    cuda: bool = True
    unified_memory: bool = False
    runtime_bytes: int = 0
    margin: float = MARGIN


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A plan that fits, its bytes, and what limits it."""

    request: Request
    plan: TrainingPlan
    terms: MemoryTerms
    useful_rank: int
    reason: str
    binding: tuple[str, ...]

    @property
    def accumulation(self) -> int:
        """Passes per optimizer step."""
        return self.request.batch // self.plan.batch


def useful_rank(num_examples: int | None) -> int:
    """The largest power of two with ten examples for each direction, at most 256."""
    if num_examples is None:
        return USUAL_RANK
    rank = max(1, num_examples // EXAMPLES_PER_DIRECTION)
    return min(LARGEST_RANK, 1 << (rank.bit_length() - 1))


def make_plan(shape: ModelShape, request: Request) -> Choice:
    """The best plan for ``shape`` that fits ``request.memory_bytes`` with its margin.

    Raises:
        UserError: nothing fits (with the missing bytes and a plan that would fit); a quantization
            that the device cannot run; a length above the model's maximum.
    """
    _check(shape, request)
    largest = request.rank or min(useful_rank(request.num_examples), _full_rank(shape, request))
    ranks = [request.rank] if request.rank else halved(largest)
    for rank in ranks:
        for plan in _candidates(shape, request, rank):
            terms = training_memory(shape, plan)
            if needed_bytes(terms, request) <= request.memory_bytes:
                return Choice(
                    request=request,
                    plan=plan,
                    terms=terms,
                    useful_rank=largest,
                    reason=_reason(rank, largest, request),
                    binding=_binding(terms),
                )
    raise _nothing_fits(shape, request, ranks[-1])


def _full_rank(shape: ModelShape, request: Request) -> int:
    """The largest power of two up to the full rank of a target."""
    targets = shape.targets(request.target_modules)
    return 1 << (max(min(x.out_features, x.in_features) for x in targets).bit_length() - 1)


def settings(choice: Choice) -> dict[str, str]:
    """The plan as keys of the configuration; evaluation takes no more rows than training."""
    plan = choice.plan
    chosen = {
        "model.quantization": plan.quantization,
        "model.dtype": plan.dtype,
        "ranks.policy": "fixed",
        "ranks.fixed": str(plan.rank),
        "train.optim": plan.optim,
        "train.per-device-train-batch-size": str(plan.batch),
        "train.gradient-accumulation-steps": str(choice.accumulation),
        "train.gradient-checkpointing": str(plan.gradient_checkpointing).lower(),
        "train.max-length": str(plan.max_length),
        "eval.batch-size": str(plan.batch),
    }
    if plan.attention != "auto":
        chosen["model.attn-implementation"] = plan.attention
    if plan.target_modules != "all-linear":
        chosen["lora.target-modules"] = plan.target_modules
    if plan.carried_rank:
        carried = {"method.name": "carried", "method.carried-rank": str(plan.carried_rank)}
        chosen |= {**carried, "method.carried-dtype": plan.carried_dtype}
    return chosen


def needed_bytes(terms: MemoryTerms, request: Request) -> int:
    """Bytes of a plan with the margin, which excludes the known bytes of the runtime."""
    return round((terms.total - terms.runtime) * (1.0 + request.margin)) + terms.runtime


def halved(number: int) -> list[int]:
    """``number`` and its halves down to 1."""
    return [max(1, number >> step) for step in range(number.bit_length())]


def _bases(shape: ModelShape, request: Request) -> list[tuple[str, str]]:
    """Supported (quantization, dtype), the least rounding first."""
    small = "bfloat16" if request.bfloat16 else "float32"
    checkpoint = small if shape.dtype in ("bfloat16", "float16") else "float32"
    bases = [("none", checkpoint), ("none", small), ("8bit", small), ("nf4", small)]
    return [
        (quantization, dtype)
        for quantization, dtype in dict.fromkeys(bases)
        if quantization in QUANTIZATIONS
        and (quantization == "none" or request.quantizes)
        and request.quantization in ("", quantization)
        and (request.attention != FLASH or dtype == "bfloat16")
    ]


def _candidates(shape: ModelShape, request: Request, rank: int) -> Iterator[TrainingPlan]:
    """Every plan at a trained rank, the best first."""
    wanted = max(request.carried_rank, rank) if request.carried_rank else 0
    optimizers = ["adamw_torch", "adamw_8bit"] if request.quantizes else ["adamw_torch"]
    carried_ranks = [c for c in halved(wanted) if c >= rank] if wanted else [0]
    choices = itertools.product(
        _bases(shape, request),
        carried_ranks,
        ("float32", "bfloat16") if wanted else ("float32",),
        [request.optim] if request.optim else optimizers,
        (False, True),
        [size for size in range(request.batch, 0, -1) if request.batch % size == 0],
    )
    for (quantization, dtype), carried_rank, carried_dtype, optim, checkpointing, batch in choices:
        yield TrainingPlan(
            rank=rank,
            max_length=request.max_length,
            batch=batch,
            quantization=quantization,
            dtype=dtype,
            carried_rank=carried_rank,
            carried_dtype=carried_dtype,
            gradient_checkpointing=checkpointing,
            optim=optim,
            attention=request.attention,
            target_modules=request.target_modules,
            unified_memory=request.unified_memory,
            runtime_bytes=request.runtime_bytes,
        )


def _binding(terms: MemoryTerms) -> tuple[str, ...]:
    """The largest terms, until they are two thirds of the whole."""
    ordered = sorted(terms.items(), key=lambda item: -item[1])
    before = itertools.accumulate((count for _, count in ordered), initial=0)
    pairs = zip(ordered, before, strict=False)  # the sum of the terms before each
    return tuple(name for (name, _), reached in pairs if 3 * reached < 2 * terms.total)


def _reason(rank: int, largest: int, request: Request) -> str:
    if request.rank:
        return f"rank {rank} was asked for"
    if rank < largest:
        return f"rank {2 * rank} does not fit"
    if request.num_examples is None and rank == USUAL_RANK:
        return f"the usual largest rank; --examples may support more than {USUAL_RANK}"
    if rank == LARGEST_RANK:
        return "the largest rank that is proposed"
    if rank < useful_rank(request.num_examples):
        return "the whole rank of the model's modules"
    return f"{request.num_examples} examples give ten to each of {rank} directions"


def _check(shape: ModelShape, request: Request) -> None:
    for flag, key, wanted in (
        ("--quantization", "model.quantization", request.quantization),
        ("--optim", "train.optim", request.optim),
        ("--attn-implementation", "model.attn-implementation", request.attention),
    ):
        known = choices(KEYS[key].annotation)
        if wanted and wanted not in known:
            raise UserError(
                f"{flag} is '{wanted}', expected one of {', '.join(known)}.{nearest(wanted, known)}"
            )
    _check_device(request)
    if request.max_length > shape.max_positions:
        raise UserError(
            f"--max-length is {request.max_length}, but the model was built for at most "
            f"{shape.max_positions} positions."
        )
    for name, value, least in (
        ("--max-length", request.max_length, 1),
        ("--batch", request.batch, 1),
        ("--examples", request.num_examples, 1),
        ("--rank", request.rank or 1, 1),
        ("--carried-rank", request.carried_rank, 0),
    ):
        if value is not None and value < least:
            raise UserError(f"{name} is {value}, expected at least {least}.")
    if request.memory_bytes < 1:
        raise UserError(f"there are {request.memory_bytes} bytes of memory, expected more.")


def _check_device(request: Request) -> None:
    """Refuse requests that the device does not support."""
    for flag, wanted in (("--quantization", request.quantization), ("--optim", request.optim)):
        if wanted in BITSANDBYTES and not request.quantizes:
            raise UserError(
                f"{flag} '{wanted}' was asked for, but bitsandbytes is not known to run on this "
                f"device; leave {flag} out or take another device."
            )
    if request.optim.startswith("paged") and not request.cuda:
        raise UserError(
            f"--optim '{request.optim}' needs CUDA's managed memory, which this device does not "
            "have; take adamw_8bit."
        )
    if request.attention == FLASH and not (request.cuda and request.bfloat16):
        raise UserError(
            f"--attn-implementation '{FLASH}' needs CUDA and bfloat16, which this device does not "
            "have both; take sdpa."
        )


def _nothing_fits(shape: ModelShape, request: Request, rank: int) -> UserError:
    """The error with the missing bytes of the smallest plan and the length that would fit."""
    plans = _candidates(shape, request, rank)
    plan = min(plans, key=lambda candidate: training_memory(shape, candidate).total)
    needed = needed_bytes(training_memory(shape, plan), request)
    base = "NF4" if plan.quantization == "nf4" else f"{plan.quantization} ({plan.dtype})"
    return UserError(
        f"{shape.model_type} of {shape.num_parameters:,} parameters does not fit "
        f"{request.memory_bytes:,} bytes: at rank {rank} in {base}, one row of "
        f"{request.max_length} tokens at a time, it needs {needed:,} bytes, "
        f"{needed - request.memory_bytes:,} more.{_what_would_fit(shape, plan, request)}"
    )


def _what_would_fit(shape: ModelShape, plan: TrainingPlan, request: Request) -> str:
    """A shorter row of the same model that fits, or else the size of a model that does."""
    for length in (length for length in halved(plan.max_length)[1:] if length >= 8):
        shorter = replace(plan, max_length=length)
        if needed_bytes(training_memory(shape, shorter), request) <= request.memory_bytes:
            return f" It fits with --max-length {length}."
    terms = training_memory(shape, plan)  # the weights are the same at every moment
    weights = terms.quantized_weights + terms.unquantized_weights
    rest = terms.total - weights
    room = request.memory_bytes / (1.0 + request.margin) - rest
    share = max(0.0, room / weights)
    if share * shape.num_parameters < 1e6:
        return " No model of that kind would fit; take a device with more memory."
    return (
        f" A model of about {share * shape.num_parameters / 1e6:.3g} million parameters would fit."
    )
