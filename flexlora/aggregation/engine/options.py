"""The options of a method: a frozen pydantic model, declared in the method's file.

A key ``method.server-learning-rate`` is the field ``server_learning_rate``. This module does not
import torch, so the command line can describe and check options without it.
"""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flexlora.errors import nearest

__all__ = [
    "CARRIED_RANK",
    "UNCAPPED",
    "AdaptiveStepOptions",
    "MethodOptions",
    "Options",
    "StepOptions",
    "choices",
    "in_a_sentence",
    "option",
]

CARRIED_RANK = 32  # the default of every method that carries factors
UNCAPPED = 1 << 30  # as ``server_max_rank``: no bound on the rank of G


def kebab_case(field: str) -> str:
    return field.replace("_", "-")


class Options(BaseModel):
    """A frozen group of options: kebab-case keys, no unknown ones, no silent conversions."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        alias_generator=kebab_case,
        validate_by_name=True,
        validate_by_alias=True,
    )

    @classmethod
    def option_names(cls) -> list[str]:
        """The kebab-case keys in their order."""
        return [kebab_case(field) for field in cls.model_fields]


def option(default: Any, help: str, **bounds: float) -> Any:
    """A field with one line of help; ``bounds`` are pydantic's ``ge``, ``le`` and ``gt``."""
    return Field(default=default, description=help, **bounds)  # type: ignore[call-overload] # bounds


def choices(annotation: object) -> tuple[Any, ...]:
    """The values that a ``Literal`` allows; empty for other types."""
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def in_a_sentence(error: ValidationError, model: type[Options], prefix: str = "") -> str:
    """The first mistake of ``error``: the key, what arrived, what was expected."""
    first = error.errors()[0]
    field = str(first["loc"][0]).replace("-", "_")
    key, value, bound = prefix + kebab_case(field), first["input"], first.get("ctx", {})
    if field not in model.model_fields:
        names = [prefix + name for name in model.option_names()]
        return f"unknown key '{key}'.{nearest(key, names)}"
    kind = model.model_fields[field].annotation
    known = choices(kind)
    if known:
        listing = ", ".join(choice or "nothing" for choice in known)
        return f"{key} is {value!r}, expected one of {listing}.{nearest(str(value), known)}"
    if first["type"] == "value_error":  # a validator's own sentence
        return f"{key} {bound['error']}"
    if first["type"] == "finite_number":
        return f"{key} is {value}, expected a finite number."
    for limit, words in (("ge", "at least"), ("le", "at most"), ("gt", "more than")):
        if limit in bound:
            return f"{key} is {value}, expected {words} {bound[limit]:g}."
    kinds: dict[object, str] = {bool: "true or false", int: "a whole number", float: "a number"}
    return f"{key} is {value!r}, expected {kinds.get(kind, 'a text')}."


class MethodOptions(Options):
    """The options of every method; ``name`` is the key in ``METHODS``."""

    name: str = option("", "the aggregation method")


class StepOptions(MethodOptions):
    """The server's optimizer step and the rank of ``G`` per module."""

    server_learning_rate: float = option(1.0, "step on the aggregate", gt=0.0)
    server_optimizer: Literal["sgd", "momentum"] = option("sgd", "how the server steps")
    server_momentum: float = option(0.9, "momentum of the server's optimizer", ge=0.0, le=0.999)
    server_max_rank: int = option(256, "rank of G that is kept per module", ge=1)
    error_feedback: bool = option(False, "add what truncation drops to the next sum")


class AdaptiveStepOptions(StepOptions):
    """The server's step for methods whose sum is a change: 0 is the rate of ``server_rate.py``."""

    server_learning_rate: float = option(
        0.0, "step on the mean change (0: FedExP's, from the updates of each round)", ge=0.0
    )
