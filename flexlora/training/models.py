"""The frozen base model, loaded once per process, and its tokenizer.

``embedded`` is the tiny base of the package; any other name is a local folder or a hub name, read
as safetensors only, never as a pickle, and code in its folder is never run. Weights are bfloat16,
float32 or float64, 8-bit (LLM.int8(), arXiv 2208.07339), or as NF4 with double quantization (QLoRA,
arXiv 2305.14314).

Attention runs as configured; ``auto`` is torch's fused ``sdpa`` where the model has it, else
``eager``, which stores scores ``[heads, T, T]``.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from flexlora.config.base_config import base_config, config_file, not_causal
from flexlora.config.paths import resolve_name
from flexlora.errors import UserError, nearest, reason
from flexlora.training.base_model import BaseModel
from flexlora.training.checkpoint import check_loaded, listed, open_checkpoint
from flexlora.training.fingerprint import fingerprint
from flexlora.training.gguf_weights import write_missing_weights
from flexlora.training.tokenizer import load_tokenizer

__all__ = ["BaseModel", "load_base", "pick_device", "resolve_name"]

LOG = logging.getLogger(__name__)

_loaded: dict[tuple[str, ...], BaseModel] = {}


def pick_device(name: str) -> torch.device:
    """``cpu`` or ``cuda:0``; ``auto`` is CUDA where there is one.

    The index is named, since some of torch's functions refuse a CUDA device without one.

    Raises:
        UserError: ``cuda`` where there is none.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("engine.device is 'cuda' but torch sees no CUDA device; use 'cpu'.")
    return torch.device("cuda", 0) if available and name != "cpu" else torch.device("cpu")


def load_base(
    name: str,
    *,
    dtype: str = "float32",
    quantization: str = "none",
    outlier_threshold: float = 0.0,
    attention: str = "auto",
    device: str = "auto",
    fresh: bool = False,
) -> BaseModel:
    """The base model of that name, frozen; the same arguments give the same object.

    ``fresh`` loads a separate copy, for a caller that changes the weights.

    Raises:
        UserError: a model that does not exist or cannot be read, attention that cannot run.
    """
    source, where = resolve_name(name), pick_device(device)
    _check_attention(attention, dtype, where)
    # Only 8-bit has outliers: the other bases do not depend on the threshold.
    threshold = outlier_threshold if quantization == "8bit" else 0.0
    if fresh:
        return _load(source, name, dtype, quantization, threshold, attention, where)
    key = (source, dtype, quantization, str(threshold), attention, str(where))
    if key not in _loaded:
        _loaded[key] = _load(source, name, dtype, quantization, threshold, attention, where)
    return _loaded[key]


def _check_attention(attention: str, dtype: str, device: torch.device) -> None:
    """Refuse Flash Attention where it cannot run; loading refuses the other kinds.

    The package must be installed: transformers would otherwise fetch kernels from the hub.
    """
    if attention != "flash_attention_2":
        return
    cause = ""
    if device.type != "cuda":
        cause = f"runs on CUDA, but training runs on the {device.type}"
    elif importlib.util.find_spec("flash_attn") is None:
        cause = "needs the flash-attn package, which is not installed"
    elif dtype != "bfloat16":
        cause = f"takes 16-bit numbers, but model.dtype is {dtype}, not bfloat16"
    if cause:
        key = "model.attn-implementation"
        raise UserError(f"{key} is '{attention}', which {cause}; use 'sdpa' or 'auto'.")


def _load(
    source: str,
    name: str,
    dtype: str,
    quantization: str,
    outlier_threshold: float,
    attention: str,
    device: torch.device,
) -> BaseModel:
    """Load a base; all checks of its files come before the weights are read.

    The model is what its files hold; the fingerprint is of the files. Whether the model is causal
    is seen when its targets are chosen (``targets.py``).
    """
    config = base_config(name)
    folder = config_file(name).parent
    local = Path(source).is_dir()
    if local:
        write_missing_weights(folder, name)
    where = {"local_files_only": True} if local else {"revision": folder.name}
    stored = open_checkpoint(folder, name) if local else None
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if attention != "auto":
        options["attn_implementation"] = attention
    with _silence():
        if quantization != "none":
            options |= _quantized(quantization, dtype, outlier_threshold, device)
        _check_architecture(config, source, name, where)
        tokenizer = load_tokenizer(source, name, **where)
        model, info = _read(source, name, attention, options | where)
        ignored = check_loaded(model, info, name)
        if quantization == "none":
            model.to(device)
        model.requires_grad_(False).eval()
    if ignored:
        LOG.warning("model '%s': %s are of no use for text and were ignored", name, listed(ignored))
    stored = (stored or open_checkpoint(folder, name)).without(ignored)
    return BaseModel(
        name=name,
        model=model,
        tokenizer=tokenizer,
        fingerprint=fingerprint(model, stored),
        device=device,
    )


@contextmanager
def _silence() -> Iterator[None]:
    """transformers' own lines and bars are off: an error is one sentence of ours."""
    from transformers.utils import logging as of_transformers

    of_transformers.disable_progress_bar()
    verbosity = of_transformers.get_verbosity()
    of_transformers.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        of_transformers.set_verbosity(verbosity)


def _check_architecture(
    config: Mapping[str, Any], source: str, name: str, where: Mapping[str, Any]
) -> None:
    """Refuse what transformers has no causal language model for, and an adapter beside the base.

    Raises:
        UserError: either of them, or a config.json with values that cannot be.
    """
    from transformers import CONFIG_MAPPING, AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.utils import find_adapter_config_file

    model_type = config["model_type"]
    if model_type not in CONFIG_MAPPING:
        raise UserError(
            f"model '{name}' has the model_type '{model_type}' in its config.json, which the "
            "transformers installed here does not have; update transformers, or correct the name."
            + nearest(model_type, CONFIG_MAPPING.keys())
        )
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise not_causal(name, model_type)
    try:
        AutoConfig.from_pretrained(source, trust_remote_code=False, **where)
    except Exception as error:  # the families raise different errors
        raise UserError(
            f"config.json of model '{name}' is refused by transformers: {reason(error)}"
        ) from error
    if find_adapter_config_file(source, **where) is not None:  # base_config has seen a folder's
        raise UserError(
            f"hub model '{name}' holds an adapter (adapter_config.json); expected a base alone: "
            "give the base that the adapter is for, or copy the base's files into a folder."
        )


def _read(source: str, name: str, attention: str, options: Mapping[str, Any]) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    try:
        auto: Any = AutoModelForCausalLM  # its type does not know output_loading_info
        model, info = auto.from_pretrained(
            source,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # check_loaded refuses them, by name
            **options,
        )
    except Exception as error:  # a damaged file may raise any error
        if attention != "auto" and "does not support" in str(error):
            raise UserError(
                f"model.attn-implementation is '{attention}', which model '{name}' cannot run; "
                "use 'auto'."
            ) from error
        raise UserError(f"model '{name}' cannot be loaded: {reason(error)}") from error
    return model, info


def _quantized(
    quantization: str, dtype: str, outlier_threshold: float, device: torch.device
) -> dict[str, Any]:
    """Options with which transformers rounds the weights while it loads them."""
    from transformers import BitsAndBytesConfig

    chosen: dict[str, Any] = {"load_in_8bit": True, "llm_int8_threshold": outlier_threshold}
    if quantization != "8bit":
        chosen = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": getattr(torch, dtype),
        }
    return {"quantization_config": BitsAndBytesConfig(**chosen), "device_map": {"": device}}


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
