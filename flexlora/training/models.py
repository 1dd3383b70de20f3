"""The frozen base model, loaded once per process, and its tokenizer.

``embedded`` is the tiny base of the package; any other name is a local folder or a hub name, read
as safetensors only, never as a pickle. Weights are bfloat16, float32 or float64, 8-bit (LLM.int8(),
arXiv 2208.07339), or as NF4 with double quantization (QLoRA, arXiv 2305.14314).

Attention runs as configured; ``auto`` is torch's fused ``sdpa`` where the model has it, else
``eager``, which stores scores ``[heads, T, T]``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flexlora.config.paths import resolve_name
from flexlora.errors import UserError

__all__ = ["BaseModel", "load_base", "pick_device", "resolve_name"]

_loaded: dict[tuple[str, ...], BaseModel] = {}


@dataclass(frozen=True, kw_only=True, eq=False)
class BaseModel:
    """A frozen causal language model in evaluation mode, its tokenizer and its fingerprint."""

    name: str
    model: Any
    tokenizer: Any
    fingerprint: str
    device: torch.device

    @property
    def pad_token_id(self) -> int:
        """The tokenizer's padding id, or 0 where the model embeds none (masked out either way)."""
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None and 0 <= pad < self.vocabulary else 0

    @property
    def vocabulary(self) -> int:
        """How many token ids the model embeds; a tokenizer may have more."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def max_positions(self) -> int | None:
        """The longest sequence the model was built for, where its config says so."""
        return getattr(self.model.config, "max_position_embeddings", None)


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one.

    Raises:
        UserError: ``cuda`` where there is none.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("engine.device is 'cuda' but torch sees no CUDA device; use 'cpu'.")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


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
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logging = transformers.utils.logging
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # errors become one sentence below
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "use_safetensors": True}
    if attention != "auto":
        options["attn_implementation"] = attention
    if quantization != "none":
        chosen = _bitsandbytes_options(quantization, dtype, outlier_threshold)
        options["quantization_config"] = transformers.BitsAndBytesConfig(**chosen)
        options["device_map"] = {"": device}
    local = Path(source).is_dir()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
        model: Any = AutoModelForCausalLM.from_pretrained(source, local_files_only=local, **options)
    except Exception as error:  # a damaged file may raise any error
        if attention != "auto" and "does not support" in str(error):
            raise UserError(
                f"model.attn-implementation is '{attention}', which model '{name}' cannot run; "
                "use 'auto'."
            ) from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"model '{name}' cannot be loaded: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)
    if quantization == "none":
        model.to(device)
    model.requires_grad_(False).eval()
    return BaseModel(
        name=name,
        model=model,
        tokenizer=tokenizer,
        fingerprint=_fingerprint(model),
        device=device,
    )


def _bitsandbytes_options(
    quantization: str, dtype: str, outlier_threshold: float
) -> dict[str, Any]:
    if quantization == "8bit":
        return {"load_in_8bit": True, "llm_int8_threshold": outlier_threshold}
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": getattr(torch, dtype),
    }


def _fingerprint(model: Any) -> str:
    """SHA-256 over the shapes of the model and its unquantized weights as bfloat16 samples.

    Different bases have different fingerprints; one base as float32, bfloat16 or NF4 has the same,
    since embeddings and norms are not quantized. At most 4096 numbers of a tensor are read, so it
    takes milliseconds for billions of weights.
    """
    sha = hashlib.sha256(f"{model.config.model_type}|{model.config.vocab_size}".encode())
    for name, tensor in sorted(model.named_parameters()):
        if not name.endswith("weight") or linear_like(model, name):
            continue
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 4096)].to("cpu", torch.bfloat16).contiguous()
        sha.update(f"{name}|{tuple(tensor.shape)}|".encode())
        sha.update(sample.view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:32]


def linear_like(model: Any, parameter: str) -> bool:
    """Whether a parameter belongs to a linear, the kind that quantization replaces."""
    owner = model.get_submodule(parameter.rpartition(".")[0])
    return type(owner).__name__.startswith(("Linear", "Conv1D"))


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
