"""The forms that ``flexlora export`` writes.

portable, peft   a PEFT folder, of one rank or of each module's own (``lora/layouts.py``)
merged           the base with the adapter in its weights, as transformers saves it
gguf             the same as one file for llama.cpp, with the tokenizer
gguf-lora        the adapter as a file for llama.cpp
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flexlora.deploy.adapter_checks import misfit
from flexlora.deploy.model_card import Exported, base_title, license_of, summary, write_card
from flexlora.errors import UserError, nearest
from flexlora.lora.adapters import Adapter
from flexlora.lora.layouts import Layout
from flexlora.lora.peft_folder import save_adapter
from flexlora.report.records import read_run
from flexlora.runs.sources import Sources, write_origin
from flexlora.simulations.inspection import check_sources
from flexlora.training.models import BaseModel, load_base, resolve_name

__all__ = ["FORMS", "Source", "write_form"]

LAYOUTS: dict[str, Layout] = {"portable": "portable", "peft": "compact"}
FORMS = (*LAYOUTS, "merged", "gguf", "gguf-lora")
NUMBERS = {"float32": "f32", "float64": "f32", "bfloat16": "bf16"}


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is exported: the adapter, the base that it belongs to, a sentence about it, its run."""

    adapter: Adapter
    model: str
    dtype: str
    quantization: str
    sources: Sources | None
    fan_in_fan_out: bool
    text: str
    run: Path | None


def write_form(
    found: Source,
    folder: Path,
    *,
    form: str,
    target: str,
    allow_changed: bool,
    dequantize: bool,
    dtype: str,
) -> None:
    """Write ``found`` into ``folder`` as ``form``, one of ``FORMS``, and a model card beside it.

    Raises:
        UserError: see ``export``.
    """
    _check_options(found, form, dequantize, dtype)
    about = _about(found, form, dequantize)
    if form in LAYOUTS:
        base = resolve_name(found.model)
        transposed = found.fan_in_fan_out
        layout = LAYOUTS[form]
        save_adapter(found.adapter, folder, base=base, layout=layout, fan_in_fan_out=transposed)
        if found.sources is not None:
            write_origin(folder, found.sources.base)
    elif form == "gguf-lora":
        _write_gguf_adapter(found, folder, about, target)
    else:
        _write_whole(found, folder, about, target, allow_changed, dtype)
    write_card(folder, about)


def _check_options(found: Source, form: str, dequantize: bool, dtype: str) -> None:
    if dtype and form != "gguf":
        raise UserError(f"--dtype is of --format gguf, and --format is '{form}'; leave it out.")
    if dtype and dtype not in (known := tuple(dict.fromkeys((*NUMBERS.values(), "f16")))):
        raise UserError(f"--dtype is '{dtype}', expected f32, f16 or bf16.{nearest(dtype, known)}")
    whole = form in ("merged", "gguf")
    if dequantize and not (whole and found.quantization):
        cause = "the adapter was trained on a base of full precision"
        cause = cause if whole else f"--format is '{form}', which holds no base"
        raise UserError(f"--dequantize is given, but {cause}; leave it out.")
    if not whole or not found.quantization or (dequantize and ":" not in found.quantization):
        return
    several = ":" in found.quantization
    offer = "" if several else ", or --dequantize to merge into the rounded base as float numbers"
    raise UserError(
        f"the adapter was trained on a {found.quantization} base; merged into the "
        "full-precision one it is another model. Use --format portable beside the same base"
        f"{offer}."
    )


def _about(found: Source, form: str, dequantize: bool) -> Exported:
    ranks = [factors.rank for factors in found.adapter.values()]
    return Exported(
        form=form,
        model=found.model,
        fingerprint=found.sources.base if found.sources else "",
        quantization=found.quantization,
        dequantized=dequantize,
        ranks=(min(ranks), max(ranks)),
        num_modules=len(ranks),
        run=read_run(found.run) if found.run else None,
    )


def _write_whole(
    found: Source, folder: Path, about: Exported, target: str, allow_changed: bool, dtype: str
) -> None:
    """``W + delta_weight`` in every target, as safetensors or as one GGUF file."""
    if about.form == "gguf":
        from flexlora.deploy.gguf.model_file import check_model, write_model

        check_model(_base_config(found.model), load_tokenizer_of(found.model))
    base = _merged(found, about.dequantized, target, allow_changed)
    if about.form == "merged":
        base.model.save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
        return
    write_model(
        base.model,
        base.tokenizer,
        folder / "model.gguf",
        numbers=dtype or NUMBERS[found.dtype],
        description=_description(about),
    )


@torch.no_grad()
def _merged(found: Source, dequantize: bool, target: str, allow_changed: bool) -> BaseModel:
    """A fresh base with the adapter in its weights."""
    quantization = found.quantization if dequantize else "none"
    base = load_base(
        found.model, dtype=found.dtype, quantization=quantization, device="cpu", fresh=True
    )
    now = Sources(base=base.fingerprint)
    check_sources(found.sources, now, target=target, model=base.name, allow_changed=allow_changed)
    if dequantize:
        base.model.dequantize()
    if cause := misfit(found.adapter, base.model):
        raise UserError(f"'{target}' cannot be merged into '{base.name}': {cause}")
    for name, factors in found.adapter.items():
        delta = factors.delta_weight()
        linear = base.model.get_submodule(name)
        turned = delta.T if type(linear).__name__ == "Conv1D" else delta
        linear.weight.add_(turned.to(linear.weight.dtype))
    return base


def _write_gguf_adapter(found: Source, folder: Path, about: Exported, target: str) -> None:
    """The shapes are compared with the base's; its weights are not read."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from flexlora.deploy.gguf.adapter_file import write_adapter

    config = _base_config(found.model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    if cause := misfit(found.adapter, model):
        raise UserError(f"'{target}' does not fit its base '{found.model}': {cause}")
    file = folder / "adapter.gguf"
    write_adapter(found.adapter, file, config=config, description=_description(about))


def _base_config(model: str) -> dict[str, Any]:
    """The base's configuration with its family's defaults."""
    from transformers import AutoConfig

    from flexlora.config.base_config import base_config

    return AutoConfig.for_model(**base_config(model)).to_dict()


def load_tokenizer_of(model: str) -> Any:
    from flexlora.training.tokenizer import load_tokenizer

    source = resolve_name(model)
    return load_tokenizer(source, model, local_files_only=Path(source).is_dir())


def _description(about: Exported) -> Any:
    from flexlora.deploy.gguf.metadata import Description

    name = base_title(about.model)
    return Description(
        name=f"{name} FlexLoRA",
        text=summary(about),
        license=license_of(about.model),
        base=name,
        tags=("lora", "federated-learning", "flexlora"),
    )
