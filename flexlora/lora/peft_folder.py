"""Adapters as PEFT folders, in and out: ``adapter_config.json`` and ``adapter_model.safetensors``.

Saved folders load with ``PeftModel.from_pretrained`` at the rank, alpha and scaling of every
module; folders from PEFT load here. Pickled weights are never opened.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flexlora.errors import UserError
from flexlora.lora.adapters import Adapter, LoRAFactors
from flexlora.lora.peft_names import peft_cause

__all__ = ["load_adapter", "save_adapter"]

_PREFIX = "base_model.model."
_KEY = re.compile(r"(?P<name>.+)\.(?P<label>lora_[AB])(?:\.[^.]+)?\.weight")
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "lora_bias": (False, None),
}


def save_adapter(
    adapter: Adapter, folder: str | Path, *, base: str, fan_in_fan_out: bool = False
) -> None:
    """Write ``adapter`` as a PEFT folder that names ``base`` (a path or hub name) as its model.

    ``r`` and ``lora_alpha`` are the most common ones; ``rank_pattern`` and ``alpha_pattern`` have
    the modules that differ, by full name. ``fan_in_fan_out`` is for GPT-2's ``Conv1D``.

    Raises:
        UserError: the folder ``base`` holds a model of whose modules PEFT would not load some.
        ValueError: modules that mix plain and rsLoRA scaling, which PEFT cannot express.
    """
    _check_names(adapter, base)
    if len({factors.rslora for factors in adapter.values()}) > 1:
        raise ValueError("PEFT has one use_rslora for all modules; this adapter mixes both.")
    rank = Counter(factors.rank for factors in adapter.values()).most_common(1)[0][0]
    alpha = Counter(factors.alpha for factors in adapter.values()).most_common(1)[0][0]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _whole(alpha),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": next(iter(adapter.values())).rslora,
        "use_dora": False,
        "fan_in_fan_out": fan_in_fan_out,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": list(adapter),
        "rank_pattern": {
            _pattern_key(n, adapter): f.rank for n, f in adapter.items() if f.rank != rank
        },
        "alpha_pattern": {
            _pattern_key(n, adapter): _whole(f.alpha)
            for n, f in adapter.items()
            if f.alpha != alpha
        },
    }
    tensors = {f"{_PREFIX}{key}.weight": tensor for key, tensor in adapter.tensors().items()}
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (target / "adapter_config.json").write_text(text, encoding="utf-8")


def _check_names(names: Iterable[str], base: str) -> None:
    """Refuse names that PEFT would take for others in a base whose config.json is at hand."""
    try:
        config = json.loads((Path(base) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # a hub name, or a server without the model: its clients chose the modules
    model_type = str(config.get("model_type", "")) if isinstance(config, dict) else ""
    for name in names:
        if cause := peft_cause(model_type, name):
            raise UserError(
                f"module '{name}' of '{base}' would be lost in PEFT ({cause}); "
                "train with lora.target-modules=all-linear, which leaves it out."
            )


def _pattern_key(name: str, modules: Iterable[str]) -> str:
    """The name, anchored with ``^`` where it would also match another module's name in PEFT."""
    others = (other for other in modules if other != name)
    if any(re.match(_matching(name), other) for other in others):
        return f"^{re.escape(name)}"
    return name


def _matching(pattern: str) -> str:
    """PEFT's rule: a key matches the whole name, or its end after a dot."""
    return rf"(.*\.)?({pattern})$"


def _whole(alpha: float) -> int | float:
    """16 rather than 16.0, as PEFT writes it."""
    return int(alpha) if float(alpha).is_integer() else alpha


def load_adapter(folder: str | Path) -> Adapter:
    """The adapter in a PEFT folder, float32.

    Raises:
        UserError: no such folder or file, weights that only exist as a pickle, a kind of adapter
            that is not plain LoRA, factors that do not pair up, or a rank other than the config's.
    """
    source = Path(folder)
    config_file, weights = source / "adapter_config.json", source / "adapter_model.safetensors"
    if not config_file.is_file():
        raise UserError(f"'{folder}' has no adapter_config.json; is it a PEFT folder?")
    if not weights.is_file():
        pickled = (source / "adapter_model.bin").is_file()
        hint = " It has a pickle, which is never opened; save it as safetensors." if pickled else ""
        raise UserError(f"'{folder}' has no adapter_model.safetensors.{hint}")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        tensors = load_file(weights)
    except (json.JSONDecodeError, SafetensorError, UnicodeDecodeError) as error:
        raise UserError(f"the adapter in '{folder}' cannot be read: {error}.") from None
    _check_config(config, folder)
    return _from_tensors(tensors, config, folder)


def _check_config(config: Mapping[str, Any], folder: str | Path) -> None:
    kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
    if kind != "LORA":
        raise UserError(f"'{folder}' holds {kind}, expected a LORA adapter.")
    missing = {"r", "lora_alpha"} - set(config)
    if missing:
        raise UserError(f"'{folder}': adapter_config.json lacks '{sorted(missing)[0]}'.")
    for key, allowed in _UNSUPPORTED.items():
        if key in config and config[key] not in allowed:
            raise UserError(
                f"'{folder}' has {key}={config[key]!r}, expected {allowed[0]!r}: "
                "only plain LoRA factors can be aggregated."
            )


def _from_tensors(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], folder: str | Path
) -> Adapter:
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key.removeprefix(_PREFIX))
        if match is None:
            raise UserError(f"'{folder}' holds '{key}', expected lora_A and lora_B weights only.")
        pairs.setdefault(match["name"], {})[match["label"]] = tensor.to(torch.float32)
    modules = {}
    for name, pair in pairs.items():
        if set(pair) != {"lora_A", "lora_B"}:
            raise UserError(f"'{folder}', module '{name}': only {sorted(pair)[0]} is there.")
        try:
            factors = LoRAFactors(
                **pair,
                alpha=float(_pattern(config, "alpha_pattern", name, config["lora_alpha"])),
                rslora=bool(config.get("use_rslora", False)),
            )
        except (KeyError, ValueError) as error:
            raise UserError(f"'{folder}', module '{name}': {error}") from None
        rank = int(_pattern(config, "rank_pattern", name, config["r"]))
        if factors.rank != rank:
            raise UserError(
                f"'{folder}', module '{name}': lora_A has rank {factors.rank}, "
                f"adapter_config.json says {rank}."
            )
        modules[name] = factors
    if not modules:
        raise UserError(f"'{folder}' holds no LoRA weights.")
    return Adapter(modules)


def _pattern(config: Mapping[str, Any], key: str, name: str, default: Any) -> Any:
    """The value of the first pattern that matches, the default where none does."""
    for pattern, value in (config.get(key) or {}).items():
        if re.match(_matching(pattern), name):
            return value
    return default
