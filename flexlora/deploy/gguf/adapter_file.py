"""An adapter as a GGUF file, which llama.cpp applies beside the base (``--lora FILE``).

llama.cpp computes ``alpha / rank * lora_B @ lora_A`` with one alpha for the file and the rank of
each tensor (``src/llama-adapter.cpp``), so ``compact`` of ``lora/layouts.py`` is what it reads
right: each module at the rank it has, one alpha, the scaling inside ``lora_B``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexlora.deploy.gguf.architectures import TensorNames
from flexlora.deploy.gguf.metadata import Description, open_writer
from flexlora.lora.adapters import Adapter
from flexlora.lora.layouts import laid_out

__all__ = ["write_adapter"]


def write_adapter(
    adapter: Adapter, file: Path, *, config: Mapping[str, Any], description: Description
) -> None:
    """Write ``adapter`` in float32; ``config`` is the configuration of its base.

    Raises:
        UserError: ``gguf`` is not installed, or the architecture or a module cannot be written.
    """
    names, folded = TensorNames(config), laid_out(adapter, "compact")
    tensors = {}
    for module, factors in folded.items():
        name = names.of(module)
        tensors[f"{name}.lora_a"] = factors.lora_A
        tensors[f"{name}.lora_b"] = names.ordered(module, factors.lora_B)
    alpha = next(iter(folded.values())).alpha
    with open_writer(file, names.architecture.name, description) as writer:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.float().contiguous().numpy())
