"""Public models whose sizes (of their config.json) are known here, so that no download is needed.

``population.clock-model`` takes one of these hub names, and opens no connection for it, or whatever
``flexlora plan --model`` takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexlora.planning.architectures import shape_from_config
from flexlora.planning.model_config import read_shape
from flexlora.planning.shapes import ModelShape

__all__ = ["CLOCK_MODELS", "clock_shape"]


def _config(
    model_type: str,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    key_heads: int,
    vocabulary: int,
    positions: int,
    **others: Any,
) -> dict[str, Any]:
    common = {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    return {**common, **others}


_QWEN: dict[str, Any] = {"use_sliding_window": False}

CLOCK_MODELS: Mapping[str, Mapping[str, Any]] = {
    "Qwen/Qwen2.5-0.5B": _config(
        "qwen2", 896, 4864, 24, 14, 2, 151936, 32768, tie_word_embeddings=True, **_QWEN
    ),
    "Qwen/Qwen2.5-7B": _config("qwen2", 3584, 18944, 28, 28, 4, 152064, 131072, **_QWEN),
    "meta-llama/Llama-2-7b-hf": _config(
        "llama", 4096, 11008, 32, 32, 32, 32000, 4096, torch_dtype="float16"
    ),
    "meta-llama/Meta-Llama-3-8B": _config("llama", 4096, 14336, 32, 32, 8, 128256, 8192),
    "mistralai/Mistral-7B-v0.1": _config(
        "mistral", 4096, 14336, 32, 32, 8, 32000, 32768, sliding_window=4096
    ),
}


def clock_shape(name: str) -> ModelShape:
    """The shape of a model of the table, of a folder, of a config.json or of a hub model.

    Raises:
        UserError: nothing there, or an architecture that is not known.
    """
    known = CLOCK_MODELS.get(name)
    return shape_from_config(known) if known is not None else read_shape(name)
