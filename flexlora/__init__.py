"""FlexLoRA: one language model tuned over many machines, each training LoRA at its own rank.

Names are resolved on first use, so that ``import flexlora`` loads neither torch nor Flower. The
version is that of the installed package: ``version`` in ``pyproject.toml`` is its only source.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

_HOME = {
    "Adapter": "flexlora.lora.adapters",
    "GlobalChange": "flexlora.aggregation.engine.state",
    "LoRAFactors": "flexlora.lora.adapters",
    "RankClass": "flexlora.lora.ranks",
    "UpdateRefused": "flexlora.errors",
    "UserError": "flexlora.errors",
    "aggregate": "flexlora.aggregation.aggregate",
    "load_adapter": "flexlora.lora.peft_folder",
    "save_adapter": "flexlora.lora.peft_folder",
}

__all__ = [*sorted(_HOME), "__version__"]

if TYPE_CHECKING:
    from flexlora.aggregation.aggregate import aggregate
    from flexlora.aggregation.engine.state import GlobalChange
    from flexlora.errors import UpdateRefused, UserError
    from flexlora.lora.adapters import Adapter, LoRAFactors
    from flexlora.lora.peft_folder import load_adapter, save_adapter
    from flexlora.lora.ranks import RankClass

    __version__: str


def __getattr__(name: str) -> object:
    if name == "__version__":
        # Kept: it is read from the disk, and a server compares it with that of every node.
        globals()[name] = importlib.import_module("importlib.metadata").version("flexlora")
        return globals()[name]
    if name not in _HOME:
        raise AttributeError(f"module 'flexlora' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
