"""``flexlora plan``: which rank, quantization and batch a device can train, and the bytes of it.

Reads a model's config.json and nothing else: no weights, no torch, and a connection only for a
hub name, whose config.json alone is fetched.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from flexlora.config.sections import Train
from flexlora.errors import UserError, nearest
from flexlora.planning.devices import DEVICES, Device, find_device, this_machine
from flexlora.planning.model_config import read_shape
from flexlora.planning.planner import Choice, Request, make_plan, needed_bytes, settings
from flexlora.planning.shapes import ModelShape
from flexlora.units import human_bytes, parse_bytes

__all__ = ["Question", "plan_command"]

MOMENTS = {"adamw_torch": "32 bit", "sgd": "none", "adamw_8bit": "8 bit"}
MOMENTS |= {"paged_adamw_8bit": "paged"}


@dataclass(frozen=True, kw_only=True)
class Question:
    """The command line's options; None and "" are what was not given."""

    model: str
    memory: str = ""
    device: str = ""
    examples: int | None = None
    max_length: int | None = None
    batch: int | None = None
    rank: int = 0
    carried_rank: int | None = None
    quantization: str = ""
    optim: str = ""
    attn_implementation: str = ""
    target_modules: str = "all-linear"
    format: str = "text"
    table: bool = False


def plan_command(question: Question) -> int:
    """Answer ``question`` on standard output.

    Raises:
        UserError: whatever a person mistyped, and a model that does not fit.
    """
    if question.format not in ("text", "json"):
        hint = nearest(question.format, ("text", "json"))
        raise UserError(f"--format is '{question.format}', expected text or json.{hint}")
    given = [bool(question.memory), bool(question.device), question.table]
    if sum(given) > 1:
        raise UserError("--memory, --device and --table ask for different things; give one.")
    shape = read_shape(question.model)
    if question.table:
        return _print_table(shape, question)
    device = _device(question)
    choice = make_plan(shape, _request(shape, question, device))
    if question.format == "json":
        print(json.dumps(_as_json(shape, question, device, choice), indent=2))
    else:
        _print_choice(shape, question, device, choice)
    return 0


def _device(question: Question) -> Device:
    if question.memory:
        size = parse_bytes(question.memory)
        # A number of bytes is what there is beyond the process itself, on a card like most.
        return Device(name=question.memory, memory_gib=size / 2**30, kind="", free_bytes=size)
    return find_device(question.device) if question.device else this_machine()


def _request(shape: ModelShape, question: Question, device: Device) -> Request:
    length = Train().max_length
    wanted = {
        "batch": question.batch,
        "carried_rank": question.carried_rank,
        "num_examples": question.examples,
    }
    return Request(
        memory_bytes=device.usable_bytes,
        max_length=question.max_length or min(length, shape.max_positions),
        quantization=question.quantization,
        optim=question.optim,
        attention=question.attn_implementation or "auto",
        rank=question.rank,
        target_modules=question.target_modules,
        bfloat16=device.bfloat16,
        quantizes=device.quantizes,
        cuda=device.kind != "cpu",
        unified_memory=device.unified,
        runtime_bytes=device.runtime_bytes,
        **{key: value for key, value in wanted.items() if value is not None},
    )


def _as_json(
    shape: ModelShape, question: Question, device: Device, choice: Choice
) -> dict[str, Any]:
    return {
        "model": question.model,
        "model_type": shape.model_type,
        "num_parameters": shape.num_parameters,
        "device": asdict(device),
        "memory_bytes": choice.request.memory_bytes,
        "needed_bytes": needed_bytes(choice.terms, choice.request),
        "total_bytes": choice.terms.total,
        "margin": choice.request.margin,
        "moment": choice.terms.moment,
        "terms": {name: count for name, count in choice.terms.items() if count},
        "binding": list(choice.binding),
        "plan": asdict(choice.plan),
        "gradient_accumulation_steps": choice.accumulation,
        "useful_rank": choice.useful_rank,
        "reason": choice.reason,
        "settings": settings(choice),
    }


def _console() -> Any:
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    return console if console.is_terminal else Console(highlight=False, markup=False, width=120)


def _print_choice(shape: ModelShape, question: Question, device: Device, choice: Choice) -> None:
    from rich.table import Table

    plan, terms, console = choice.plan, choice.terms, _console()
    console.print(
        f"{question.model}: {shape.model_type}, {shape.num_parameters:,} parameters; "
        f"{device.name}: {human_bytes(device.usable_bytes)} to use"
    )
    console.print(
        f"Train rank {plan.rank} ({choice.reason})"
        + (f", carry rank {plan.carried_rank} in {plan.carried_dtype}" if plan.carried_rank else "")
        + f", base {_held(choice)}, {plan.batch} x {choice.accumulation} rows of "
        f"{plan.max_length} tokens, {'with' if plan.gradient_checkpointing else 'no'} "
        f"checkpointing, {plan.optim}"
        + (f", {plan.attention} attention" if plan.attention != "auto" else "")
    )
    table = Table(title=f"bytes at the widest moment: {terms.moment}")
    table.add_column("term")
    table.add_column("bytes", justify="right")
    table.add_column("share", justify="right")
    for name, count in terms.items():
        if count:
            mark = " *" if name in choice.binding else ""
            share = f"{count / terms.total:.0%}"
            table.add_row(name.replace("_", " ") + mark, human_bytes(count), share)
    table.add_section()
    table.add_row("total", human_bytes(terms.total), "100%")
    needed = needed_bytes(terms, choice.request)
    table.add_row(f"with a margin of {choice.request.margin:.0%}", human_bytes(needed), "")
    console.print(table)
    console.print("* what binds: the largest terms, two thirds of the whole together")
    chosen = settings(choice)
    if not question.model.endswith(".json"):  # a configuration alone has no weights to train on
        chosen = {"model.name": question.model, **chosen}
    sets = " ".join(f"--set {key}={value}" for key, value in chosen.items())
    console.print(f"flexlora simulate {sets}", soft_wrap=True)


def _held(choice: Choice) -> str:
    plan = choice.plan
    return plan.dtype if plan.quantization == "none" else f"{plan.quantization} in {plan.dtype}"


def _print_table(shape: ModelShape, question: Question) -> int:
    """One row per known device; one that is too small has what it lacks in place of a plan."""
    rows = [(device, _tried(shape, question, device)) for device in DEVICES.values()]
    if question.format == "json":
        print(json.dumps([_row_json(shape, question, *row) for row in rows], indent=2))
        return 0
    from rich.table import Table

    table = Table(title=f"{question.model}: {shape.num_parameters:,} parameters")
    texts = ("device", "base", "moments")
    for column in (*texts[:1], "usable", *texts[1:], "rank", "carried", "rows", "checkpoints"):
        table.add_column(column, justify="left" if column in texts else "right")
    table.add_column("needs", justify="right")
    for device, choice in rows:
        usable = human_bytes(device.usable_bytes)
        if isinstance(choice, UserError):
            table.add_row(device.name, usable, "does not fit", *[""] * 6)
            continue
        plan = choice.plan
        table.add_row(
            device.name,
            usable,
            _held(choice),
            MOMENTS[plan.optim],
            str(plan.rank),
            str(plan.carried_rank),
            f"{plan.batch} x {choice.accumulation}",
            "yes" if plan.gradient_checkpointing else "no",
            human_bytes(needed_bytes(choice.terms, choice.request)),
        )
    _console().print(table)
    return 0


def _tried(shape: ModelShape, question: Question, device: Device) -> Choice | UserError:
    """The plan, or why there is none: a table shows small devices beside large ones."""
    try:
        return make_plan(shape, _request(shape, question, device))
    except UserError as error:
        return error


def _row_json(
    shape: ModelShape, question: Question, device: Device, choice: Choice | UserError
) -> dict[str, Any]:
    if isinstance(choice, UserError):
        return {"device": asdict(device), "plan": None, "cause": str(choice)}
    return _as_json(shape, question, device, choice)
