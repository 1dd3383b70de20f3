"""Which architectures are written as GGUF, and how their tensors are named and ordered there.

Names are from the ``gguf`` package's own table. In files of the architecture ``llama``, llama.cpp
rotates neighbouring pairs (2i, 2i + 1) of a head, transformers the halves (i, i + d/2): the rows of
``q_proj`` and ``k_proj`` (weight, bias, and ``lora_B``) are reordered by head, as llama.cpp's
``conversion/llama.py`` does. The other architectures are rotated by halves there too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flexlora.config.gguf_package import gguf_package
from flexlora.errors import UserError

__all__ = ["ARCHITECTURES", "Architecture", "TensorNames", "architecture_of", "by_pairs"]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A transformers ``model_type`` in GGUF; ``pairs``: rotated by neighbouring pairs there."""

    name: str
    pairs: bool = False


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(name="llama", pairs=True),
    "mistral": Architecture(name="llama", pairs=True),
    "qwen2": Architecture(name="qwen2"),
    "qwen3": Architecture(name="qwen3"),
}


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The GGUF architecture of a model's configuration.

    Raises:
        UserError: one that is not in the table, or settings that llama.cpp does not compute.
    """
    model_type = str(config.get("model_type"))
    if model_type not in ARCHITECTURES:
        raise UserError(
            f"the base is a '{model_type}', and GGUF files are written for "
            f"{', '.join(ARCHITECTURES)}; use --format portable or merged, and llama.cpp's own "
            "converter."
        )
    if cause := _not_computed(config):
        raise UserError(
            f"the base has {cause}, which llama.cpp does not compute for a '{model_type}'; "
            "use --format portable or merged with another runtime."
        )
    return ARCHITECTURES[model_type]


def _not_computed(config: Mapping[str, Any]) -> str:
    rope = config.get("rope_parameters") or {}
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        return f"rope_type={kind}"
    if config.get("hidden_act", "silu") != "silu":
        return f"hidden_act={config['hidden_act']}"
    window, length = config.get("sliding_window"), config.get("max_position_embeddings", 0)
    if window and config.get("use_sliding_window", True) and window < length:
        return f"a sliding_window of {window} tokens below its length of {length}"
    return ""


class TensorNames:
    """GGUF names of one model's tensors.

    Args:
        config: the ``config.json`` of the base with its family's defaults, as values.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        gguf = gguf_package()
        self.architecture = architecture_of(config)
        queries = int(config["num_attention_heads"])
        keys = int(config.get("num_key_value_heads") or queries)
        self._heads = {"q_proj": queries, "k_proj": keys} if self.architecture.pairs else {}
        kind = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == self.architecture.name)
        self._map = gguf.get_tensor_name_map(kind, int(config["num_hidden_layers"]))
        self._tied = bool(config.get("tie_word_embeddings"))

    def of(self, module: str, suffix: str = ".weight") -> str:
        """The name of a module's ``suffix``, such as ``blk.0.attn_q.weight``.

        Raises:
            UserError: llama.cpp has no tensor for it.
        """
        if self._tied and module == "lm_head":
            raise UserError(
                "module 'lm_head' shares its weight with the embeddings in this base, and "
                "llama.cpp has one tensor for both, so that it cannot be adapted alone; "
                "train without it."
            )
        name = self._map.get_name(module)
        if name is None:
            raise UserError(
                f"module '{module}' has no tensor in GGUF files of '{self.architecture.name}'; "
                "use --format portable."
            )
        return f"{name}{suffix}"

    def ordered(self, module: str, rows: Tensor) -> Tensor:
        """``rows [out_features, ...]`` of ``module`` in the order of GGUF."""
        heads = self._heads.get(module.rpartition(".")[2])
        return rows if heads is None else by_pairs(rows, heads)


def by_pairs(rows: Tensor, heads: int) -> Tensor:
    """Rows (h, half, i) in the order (h, i, half): the halves of each head become pairs."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)
