"""A whole causal language model with its tokenizer as one GGUF file.

llama.cpp's ``convert_hf_to_gguf.py`` is not on the package index and needs a folder on disk; this
writes the loaded model by the ``gguf`` package, for the architectures of ``architectures.py``.
Matrices are stored as f32, f16 or bf16, vectors (norms, biases) always as f32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexlora.config.gguf_package import gguf_package
from flexlora.deploy.gguf.architectures import TensorNames
from flexlora.deploy.gguf.metadata import Description, open_writer
from flexlora.deploy.gguf.vocabulary import read_vocabulary
from flexlora.errors import UserError

__all__ = ["NUMBERS", "check_model", "write_model"]

NUMBERS = ("f32", "f16", "bf16")


def check_model(config: Mapping[str, Any], tokenizer: Any) -> None:
    """Refuse, before anything is computed, what ``write_model`` would refuse.

    Raises:
        UserError: ``gguf`` is not installed, the architecture or the tokenizer cannot be written.
    """
    TensorNames(config)
    read_vocabulary(tokenizer, int(config["vocab_size"]))


def write_model(
    model: Any, tokenizer: Any, file: Path, *, numbers: str, description: Description
) -> None:
    """Write ``model`` with matrices as ``numbers``, one of ``NUMBERS``.

    Raises:
        UserError: see ``check_model``; a number is too large for f16.
    """
    gguf, config = gguf_package(), model.config.to_dict()
    names = TensorNames(config)
    rows = int(model.get_input_embeddings().weight.shape[0])
    vocabulary = read_vocabulary(tokenizer, rows)
    kinds = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"}
    with open_writer(file, names.architecture.name, description) as writer:
        writer.add_type("model")
        writer.add_file_type(gguf.LlamaFileType[kinds[numbers]])
        _add_sizes(writer, config, rows)
        vocabulary.add_to(writer)
        for name, tensor in _tensors(model, names, config):
            _add(writer, name, tensor, numbers)


def _add_sizes(writer: Any, config: Mapping[str, Any], rows: int) -> None:
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_vocab_size(rows)
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf_package().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def _tensors(model: Any, names: TensorNames, config: Mapping[str, Any]) -> Any:
    """GGUF name and tensor of every parameter, a tied output layer once."""
    for key, tensor in model.named_parameters():  # a tied one comes once
        module, _, label = key.rpartition(".")
        yield names.of(module, f".{label}"), names.ordered(module, tensor)
    rope = config["rope_parameters"]
    if rope.get("rope_type") == "llama3":
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        yield "rope_freqs.weight", llama3_factors(rope, int(head_dim))


def llama3_factors(rope: Mapping[str, Any], head_dim: int) -> Tensor:
    """``[head_dim / 2]``: by what Llama 3.1 divides each frequency (its ``apply_scaling``)."""
    factor, original = float(rope["factor"]), float(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    wavelengths = 2 * math.pi * float(rope["rope_theta"]) ** exponents
    share = ((original / wavelengths - low) / (high - low)).clamp(0.0, 1.0)
    return (1 / ((1 - share) / factor + share)).float()


def _add(writer: Any, name: str, tensor: Tensor, numbers: str) -> None:
    gguf, data = gguf_package(), tensor.detach().float().contiguous()
    if data.dim() == 1 or numbers == "f32":
        writer.add_tensor(name, data.numpy())
        return
    if numbers == "f16":
        half = data.half()
        if not bool(torch.isfinite(half).all()):
            raise UserError(
                f"tensor '{name}' holds numbers above 65504, which f16 cannot hold; "
                "use --dtype bf16."
            )
        writer.add_tensor(name, half.numpy())
        return
    kind = gguf.GGMLQuantizationType.BF16
    raw = data.bfloat16().view(torch.uint8).numpy()
    writer.add_tensor(name, raw, raw_dtype=kind)
