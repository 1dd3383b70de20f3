"""``flexlora plan``: which rank, quantization and batch a device can train, and the bytes of it.

Reads a model's config.json and nothing else: no weights, a connection only for a hub name, whose
config.json alone is fetched, and torch only to count the towers beside a language model.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

from typer import Option

from flexlora.aggregation.engine.options import CARRIED_RANK
from flexlora.commands.options import PATH
from flexlora.config.sections import Train
from flexlora.errors import UserError, nearest
from flexlora.planning.devices import DEVICES, Device, find_device, this_machine
from flexlora.planning.model_config import read_shape
from flexlora.planning.planner import Choice, Request, make_plan, needed_bytes, settings
from flexlora.planning.shapes import ModelShape
from flexlora.units import human_bytes, parse_bytes

__all__ = ["plan"]

MOMENTS = {"adamw_torch": "32 bit", "sgd": "none", "adamw_8bit": "8 bit"}
MOMENTS |= {"paged_adamw_8bit": "paged"}
ROWS = Train().per_device_train_batch_size


def plan(
    model: Annotated[str, Option(click_type=PATH, help="folder, hub name, embedded")],
    memory: Annotated[str, Option(metavar="SIZE", help="bytes to use, like 8GiB")] = "",
    device: Annotated[str, Option(metavar="NAME", help="a known card or board")] = "",
    table: Annotated[bool, Option("--table", help="the plan of every known device")] = False,
    examples: Annotated[int | None, Option(help="rows that the client has")] = None,
    max_length: Annotated[int | None, Option(metavar="TOKENS", help="tokens of a row")] = None,
    batch: Annotated[int, Option(metavar="ROWS", help="rows of an optimizer step")] = ROWS,
    rank: Annotated[int, Option(help="this trained rank and no other (0: any)")] = 0,
    carried_rank: Annotated[int, Option(help="0: a method without one")] = CARRIED_RANK,
    quantization: Annotated[str, Option(help="no other than this: none, 8bit or nf4")] = "",
    optim: Annotated[str, Option(help="this one (default: adamw_torch, or adamw_8bit)")] = "",
    attn_implementation: Annotated[str, Option(help="or eager, sdpa, flash_attention_2")] = "auto",
    target_modules: Annotated[str, Option(help="all-linear, or names")] = "all-linear",
    format: Annotated[str, Option(help="text or json")] = "text",
) -> None:
    if format not in ("text", "json"):
        hint = nearest(format, ("text", "json"))
        raise UserError(f"--format is '{format}', expected text or json.{hint}")
    if sum(map(bool, (memory, device, table))) > 1:
        raise UserError("--memory, --device and --table ask for different things; give one.")
    shape = read_shape(model)
    asked = {
        "max_length": max_length or min(Train().max_length, shape.max_positions),
        "batch": batch,
        "num_examples": examples,
        "carried_rank": carried_rank,
        "quantization": quantization,
        "optim": optim,
        "attention": attn_implementation,
        "rank": rank,
        "target_modules": target_modules,
    }
    if table:
        rows = [(known, _tried(shape, asked, known)) for known in DEVICES.values()]
        if format == "json":
            print(json.dumps([_as_json(model, shape, *row) for row in rows], indent=2))
        else:
            _print_table(model, shape, rows)
        return
    chosen = _device(memory, device)
    choice = make_plan(shape, _request(asked, chosen))
    if format == "json":
        print(json.dumps(_as_json(model, shape, chosen, choice), indent=2))
    else:
        _print_choice(model, shape, chosen, choice)


def _device(memory: str, name: str) -> Device:
    if memory:
        size = parse_bytes(memory)
        # A number of bytes is what there is beyond the process itself, on a card like most.
        return Device(name=memory, memory_gib=size / 2**30, kind="", free_bytes=size)
    return find_device(name) if name else this_machine()


def _request(asked: dict[str, Any], device: Device) -> Request:
    return Request(
        memory_bytes=device.usable_bytes,
        bfloat16=device.bfloat16,
        quantizes=device.quantizes,
        cuda=device.kind != "cpu",
        unified_memory=device.unified,
        runtime_bytes=device.runtime_bytes,
        **asked,
    )


def _tried(shape: ModelShape, asked: dict[str, Any], device: Device) -> Choice | UserError:
    """The plan, or why there is none: a table shows small devices beside large ones."""
    try:
        return make_plan(shape, _request(asked, device))
    except UserError as error:
        return error


def _as_json(
    model: str, shape: ModelShape, device: Device, choice: Choice | UserError
) -> dict[str, Any]:
    if isinstance(choice, UserError):
        return {"device": asdict(device), "plan": None, "cause": str(choice)}
    return {
        "model": model,
        "model_type": shape.model_type,
        "num_parameters": shape.num_parameters,
        "tower_parameters": shape.tower_numbers,
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


def _print_choice(model: str, shape: ModelShape, device: Device, choice: Choice) -> None:
    from rich.table import Table

    plan, terms, console = choice.plan, choice.terms, _console()
    console.print(
        f"{model}: {shape.model_type}, {shape.num_parameters:,} parameters; "
        f"{device.name}: {human_bytes(device.usable_bytes)} to use"
    )
    if shape.tower_numbers:
        console.print(
            f"LoRA is planned for the language model; {shape.tower_numbers:,} parameters that text "
            "does not reach are left out, and held in memory.",
            soft_wrap=True,
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
    if not model.endswith(".json"):  # a configuration alone has no weights to train on
        chosen = {"model.name": model, **chosen}
    sets = " ".join(f"--set {key}={value}" for key, value in chosen.items())
    console.print(f"flexlora simulate {sets}", soft_wrap=True)


def _held(choice: Choice) -> str:
    plan = choice.plan
    return plan.dtype if plan.quantization == "none" else f"{plan.quantization} in {plan.dtype}"


def _print_table(
    model: str, shape: ModelShape, rows: list[tuple[Device, Choice | UserError]]
) -> None:
    """One row per device; one that is too small has what it lacks in place of a plan."""
    from rich.table import Table

    table = Table(title=f"{model}: {shape.num_parameters:,} parameters")
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
