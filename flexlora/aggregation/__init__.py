"""Aggregation methods by name. A method's file, and with it torch, is imported when it is used."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from flexlora.aggregation.engine.options import MethodOptions, in_a_sentence
from flexlora.errors import UserError, nearest

if TYPE_CHECKING:
    from flexlora.aggregation.engine.method import Method

__all__ = ["METHODS", "make_method", "method_class", "method_options"]

METHODS = {
    "aligned": "flexlora.aggregation.aligned:Aligned",
    "basis": "flexlora.aggregation.basis:Basis",
    "carried": "flexlora.aggregation.carried:Carried",
    "fed-plora": "flexlora.aggregation.fed_plora:FedPLoRA",
    "fedex-lora": "flexlora.aggregation.fedex_lora:FedExLoRA",
    "fedit": "flexlora.aggregation.fedit:FedIT",
    "ffa-lora": "flexlora.aggregation.ffa_lora:FFALoRA",
    "flexlora": "flexlora.aggregation.flexlora:FlexLoRA",
    "flora": "flexlora.aggregation.flora:FLoRA",
    "florist": "flexlora.aggregation.florist:FLoRIST",
    "hetlora": "flexlora.aggregation.hetlora:HetLoRA",
    "raflora": "flexlora.aggregation.raflora:RaFLoRA",
    "rbla": "flexlora.aggregation.rbla:RBLA",
    "residual": "flexlora.aggregation.residual:Residual",
    "rolora": "flexlora.aggregation.rolora:RoLoRA",
    "slora": "flexlora.aggregation.slora:SLoRA",
}


def method_class(name: str) -> type[Method]:
    """The class of that name; its file is imported.

    Raises:
        UserError: an unknown name; there is no default branch.
    """
    if name not in METHODS:
        known = ", ".join(sorted(METHODS))
        raise UserError(
            f"method '{name}' is unknown, expected {known}.{nearest(str(name), METHODS)}"
        )
    module, _, attribute = METHODS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def method_options(name: str, values: Mapping[str, Any] = MappingProxyType({})) -> MethodOptions:
    """The options of that method, ``values`` by field name or kebab-case key, else its defaults.

    Raises:
        UserError: an unknown method, an option that it does not have (with the methods that have
            it), a value of the wrong type or out of range.
    """
    options = method_class(name).Options
    for key, value in values.items():
        field = key.replace("-", "_")
        if field not in options.model_fields:
            raise UserError(_refusal(name, field, value))
    try:
        return options.model_validate({**values, "name": name})
    except ValidationError as error:
        raise UserError(in_a_sentence(error, options, prefix="method.")) from None


def make_method(name: str, options: MethodOptions | None = None, **values: Any) -> Method:
    """The method of that name with its ``options``, or with ``values`` by field name.

    Raises:
        UserError: see ``method_options``.
    """
    return method_class(name)(options or method_options(name, values))


def _refusal(name: str, field: str, value: object) -> str:
    """The error for an option ``field`` that ``name`` lacks, with the methods that have it."""
    key = "method." + field.replace("_", "-")
    classes = {other: method_class(other).Options for other in METHODS}
    having = [other for other, options in classes.items() if field in options.model_fields]
    if not having:
        known = {option for options in classes.values() for option in options.option_names()}
        hint = nearest(key, [f"method.{option}" for option in known])
        return f"unknown key '{key}'.{hint}"
    return (
        f"{key} is {value}, which method.name={name} does not have (but {', '.join(having)} "
        f"{'does' if len(having) == 1 else 'do'}); leave it out."
    )
