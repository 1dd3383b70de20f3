"""The modules of a base that LoRA may adapt, from its ``config.json``: what nodes must report.

The server holds no base, but it may have the base's ``config.json``: of the embedded base, or in a
local folder. Then it knows names, shapes and orientation of all modules, and which of two nodes
reports another base. Nothing is downloaded for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flexlora.config.base_config import read_config
from flexlora.config.paths import expanded, resolve_name
from flexlora.errors import UserError
from flexlora.planning.architectures import shape_from_config

__all__ = ["BaseModules", "base_modules"]

TRANSPOSED = ("gpt2",)  # families whose linears store [in, out]


@dataclass(frozen=True, kw_only=True)
class BaseModules:
    """The linears of one decoder layer by name, ``(out_features, in_features)``, and the layers.

    ``chosen`` are those that get LoRA in each layer, None where the targets are an expression.
    """

    linears: Mapping[str, tuple[int, int]]
    num_layers: int
    fan_in_fan_out: bool
    chosen: frozenset[str] | None

    def difference(self, shapes: Mapping[str, tuple[int, int]], *, fan_in_fan_out: bool) -> str:
        """What modules with these shapes cannot have in common with the base; empty if nothing."""
        places = {}
        for name, shape in shapes.items():
            found = re.fullmatch(r"(.*?)\.(\d{1,5})\.(.+)", name)
            where, layer, linear = found.groups() if found else ("", "", "")
            expected = self.linears.get(linear)
            if expected is None or not int(layer) < self.num_layers:
                return f"it has no module '{name}'"
            if expected != shape:
                return f"module '{name}' is {_sides(shape)}, expected {_sides(expected)}"
            places[where, int(layer), linear] = name
        if len({where for where, _, _ in places}) > 1:
            return "the names of its modules begin differently"
        missing = self._missing({(layer, linear) for _, layer, linear in places})
        if missing:
            return f"the report lacks '{missing}'"
        if fan_in_fan_out != self.fan_in_fan_out:
            return f"fan_in_fan_out is {fan_in_fan_out}, expected {self.fan_in_fan_out}"
        return ""

    def _missing(self, reported: set[tuple[int, str]]) -> str:
        """The first chosen module that is not among the reported ones."""
        if self.chosen is None:
            return ""
        wanted = ((k, name) for k in range(self.num_layers) for name in sorted(self.chosen))
        return next((f"{k}.{name}" for k, name in wanted if (k, name) not in reported), "")


def _sides(shape: tuple[int, int]) -> str:
    return f"[{shape[0]}, {shape[1]}]"


def base_modules(name: str, target_modules: str) -> BaseModules | None:
    """The modules of the base ``model.name``.

    None if its ``config.json`` is not here or its architecture's modules are not known from it.
    """
    file = Path(expanded(name))
    folder = Path(resolve_name(name))
    file = file if file.suffix == ".json" else folder / "config.json"
    if not file.is_file():
        return None
    try:
        config = read_config(file)
        if isinstance(config.get("text_config"), Mapping):
            return None
        shape = shape_from_config(config)
    except UserError:
        return None
    try:
        chosen = frozenset(linear.name for linear in shape.targets(target_modules))
    except UserError:
        chosen = None
    return BaseModules(
        linears={
            linear.name: (linear.out_features, linear.in_features) for linear in shape.linears
        },
        num_layers=shape.num_layers,
        fan_in_fan_out=shape.model_type in TRANSPOSED,
        chosen=chosen,
    )
