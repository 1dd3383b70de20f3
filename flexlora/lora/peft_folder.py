"""Adapters as PEFT folders, in and out: ``adapter_config.json`` and ``adapter_model.safetensors``.

Saved folders have the scaling inside ``lora_B`` (``layouts.py``), so that other runtimes than PEFT
apply them as PEFT does; folders from PEFT load here. Pickled weights are never opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flexlora.errors import UserError
from flexlora.lora.adapters import Adapter, LoRAFactors
from flexlora.lora.layouts import Layout, laid_out
from flexlora.lora.peft_config import PeftConfig, matching, read_config, shown
from flexlora.lora.peft_names import peft_cause

__all__ = ["load_adapter", "save_adapter"]

_PREFIX = "base_model.model."
_KEY = re.compile(r"(?P<name>.+)\.(?P<label>lora_[AB])(?:\.[^.]+)?\.weight")


def save_adapter(
    adapter: Adapter,
    folder: str | Path,
    *,
    base: str,
    layout: Layout = "portable",
    fan_in_fan_out: bool = False,
) -> None:
    """Write ``adapter`` as a PEFT folder that names ``base`` (a path or hub name) as its model.

    ``r`` and ``lora_alpha`` are the largest rank; under ``compact`` a ``rank_pattern`` has the
    modules of lower rank, by full name. ``fan_in_fan_out`` is for GPT-2's ``Conv1D``.

    Raises:
        UserError: the folder ``base`` holds a model of whose modules PEFT would not load some.
    """
    _check_names(adapter, base)
    adapter = laid_out(adapter, layout)
    rank = max(factors.rank for factors in adapter.values())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": fan_in_fan_out,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": list(adapter),
        "rank_pattern": {
            _pattern_key(n, adapter): f.rank for n, f in adapter.items() if f.rank != rank
        },
        "alpha_pattern": {},
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
    if any(re.match(matching(name), other) for other in others):
        return f"^{re.escape(name)}"
    return name


def load_adapter(folder: str | Path) -> Adapter:
    """The adapter in a PEFT folder, float32; one of ``portable`` has its padding.

    Raises:
        UserError: no such folder or file, weights that only exist as a pickle, a file that is
            damaged, an adapter that is not plain LoRA over its base (``peft_config.py``), factors
            that do not pair up or are not finite, a rank other than the config's, a module that it
            does not target.
    """
    source = Path(folder)
    config_file, weights = source / "adapter_config.json", source / "adapter_model.safetensors"
    if not _is_file(config_file):
        raise UserError(f"'{folder}' has no adapter_config.json; is it a PEFT folder?")
    if not _is_file(weights):
        pickled = _is_file(source / "adapter_model.bin")
        hint = " It has a pickle, which is never opened; save it as safetensors." if pickled else ""
        raise UserError(f"'{folder}' has no adapter_model.safetensors.{hint}")
    config = read_config(config_file)
    modules = _modules(_pairs(weights), config, weights)
    _check_named(config, modules, weights)
    return Adapter(modules)


def _is_file(path: Path) -> bool:
    """False for a path that is too long or that may not be looked at, too."""
    try:
        return path.is_file()
    except OSError:
        return False


def _pairs(weights: Path) -> dict[str, dict[str, Tensor]]:
    """``lora_A`` and ``lora_B`` by module, float32.

    Raises:
        UserError: a file that cannot be read, another tensor, two for one factor, numbers that are
            not finite floating-point ones.
    """
    try:
        tensors = load_file(weights)
    except Exception as error:  # safetensors raises what it meets in the header, KeyError among it
        cause = " ".join(str(error).split())[:120]
        raise UserError(f"'{weights}' cannot be read as safetensors: {cause}.") from None
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key.removeprefix(_PREFIX))
        if match is None:
            raise UserError(
                f"'{weights}' holds {shown(key)}, expected lora_A and lora_B weights only."
            )
        pair = pairs.setdefault(match["name"], {})
        if match["label"] in pair:
            raise UserError(
                f"'{weights}' holds {match['label']} of module {shown(match['name'])} twice, the "
                f"second as {shown(key)}. Does it hold two adapters?"
            )
        pair[match["label"]] = _float32(tensor, key, weights)
    if not pairs:
        raise UserError(f"'{weights}' holds no LoRA weights.")
    return pairs


def _float32(tensor: Tensor, key: str, weights: Path) -> Tensor:
    if not tensor.is_floating_point():
        raise UserError(
            f"'{weights}', {shown(key)}: {tensor.dtype}, expected a floating-point dtype."
        )
    tensor = tensor.to(torch.float32)
    if not bool(torch.isfinite(tensor).all()):
        raise UserError(f"'{weights}', {shown(key)}: holds NaN or infinity.")
    return tensor


def _modules(
    pairs: Mapping[str, Mapping[str, Tensor]], config: PeftConfig, weights: Path
) -> dict[str, LoRAFactors]:
    modules = {}
    for name, pair in pairs.items():
        if set(pair) != {"lora_A", "lora_B"}:
            raise UserError(f"'{weights}', module {shown(name)}: only {sorted(pair)[0]} is there.")
        if not config.targets(name):
            raise UserError(
                f"'{weights}' holds module {shown(name)}, which adapter_config.json does not "
                "target; PEFT would leave it out."
            )
        alpha = config.alpha_of(name)
        try:
            factors = LoRAFactors(**pair, alpha=alpha, rslora=config.rslora)
        except ValueError as error:
            raise UserError(f"'{weights}', module {shown(name)}: {error}") from None
        if factors.rank != config.rank_of(name):
            raise UserError(
                f"'{weights}', module {shown(name)}: lora_A has rank {factors.rank}, "
                f"adapter_config.json says {config.rank_of(name)}."
            )
        modules[name] = factors
    return modules


def _check_named(config: PeftConfig, modules: Mapping[str, LoRAFactors], weights: Path) -> None:
    """Refuse a file without the factors of a module that the config names by its full path.

    Shorter names may be in lists that serve many models; a numbered one is one layer's.
    """
    for named in config.named_modules:
        numbered = any(part.isdigit() for part in named.split("."))
        if not numbered or named in modules or not config.targets(named):
            continue
        if not any(name.endswith(f".{named}") for name in modules):
            raise UserError(
                f"'{weights}' holds no factors of module {shown(named)}, which adapter_config.json "
                "targets. Is the file whole?"
            )
