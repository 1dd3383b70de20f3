"""``flexlora doctor --adapter DIR``: read an adapter, put it on its base, judge every runtime.

An adapter that loads may still do nothing, do it to another base, or do it at another strength in
another runtime, all without an error. Each is a finding here.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from flexlora.deploy.doctor import Check, Finding, failed, ok, warning
from flexlora.errors import UserError
from flexlora.lora.adapters import Adapter
from flexlora.lora.peft_config import PeftConfig, read_config
from flexlora.lora.peft_folder import load_adapter
from flexlora.lora.runtimes import RUNTIMES, misreading
from flexlora.training.targets import misfit

__all__ = ["adapter_checks", "misfit"]

TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps until the morning."
PORTABLE = "flexlora export {} --format portable --out NEW_FOLDER"


def adapter_checks(folder: str, base: str = "") -> list[Check]:
    """The checks of the PEFT folder ``folder`` on ``base`` (default: the one that it names).

    Raises:
        UserError: there is no such folder.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"--adapter is '{folder}', which is no folder, expected a PEFT folder.")
    try:
        adapter, config = load_adapter(path), read_config(path / "adapter_config.json")
    except UserError as error:
        unread = failed(str(error), "save it again with PEFT's save_pretrained, as plain LoRA")
        return [("files", lambda: unread)]
    return [
        ("files", partial(_check_files, adapter)),
        ("base", partial(_check_base, path, adapter, config, base)),
        ("runtimes", partial(_check_runtimes, path, adapter, config)),
    ]


def _check_files(adapter: Adapter) -> Finding:
    """What it holds."""
    ranks = sorted({factors.rank for factors in adapter.values()})
    spread = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    idle = [name for name, factors in adapter.items() if not bool(factors.lora_B.any())]
    if len(idle) == len(adapter):
        return failed("every lora_B is zero: the adapter does nothing.", "was it trained?")
    text = f"{len(adapter)} modules of rank {spread}, {adapter.num_bytes / 1e6:.1f} MB in float32"
    if idle:
        return warning(f"{text}; lora_B of '{idle[0]}' and {len(idle) - 1} others is zero.", "")
    return ok(text)


def _check_runtimes(folder: Path, adapter: Adapter, config: PeftConfig) -> list[Finding]:
    """One finding for each runtime that would misread the folder, or one for all."""
    found = [
        warning(f"{cause}.", PORTABLE.format(folder), name=runtime.name)
        for runtime in RUNTIMES
        if (cause := misreading(runtime, config, adapter))
    ]
    names = ", ".join(runtime.name for runtime in RUNTIMES)
    return found or [ok(f"read alike by {names}")]


def _check_base(folder: Path, adapter: Adapter, config: PeftConfig, given: str) -> Finding:
    """The largest change of a logit on one sentence; nothing is fetched that was not asked for."""
    from flexlora.runs.sources import Sources, read_origin
    from flexlora.training.models import load_base, resolve_name

    remedy, named = "give the base that it was trained on as --base MODEL", config.base
    try:
        if not given and not (named and Path(resolve_name(named)).is_dir()):
            text = f"not tried: it names '{named}', which is no folder on this machine."
            return warning(text, f"flexlora doctor --adapter {folder} --base MODEL")
        base = load_base(given or named, device="cpu", fresh=True)
        origin = read_origin(folder)
    except UserError as error:
        return failed(str(error), remedy)
    if cause := misfit(adapter, base.model):
        return failed(cause, remedy)
    now = Sources(base=base.fingerprint)
    if origin is not None and (changed := origin.differences(now, base.name)):
        return failed(f"{changed[0]}.", remedy)
    change = _logit_change(adapter, base)
    if change == 0.0:
        return failed("the logits are the same with and without it.", "was it trained?")
    return ok(f"moves the logits of a sentence by up to {change:.3g} on {base.name}")


def _logit_change(adapter: Adapter, base: Any) -> float:
    import torch

    from flexlora.training.slots import SlotModel

    ids = torch.tensor([base.tokenizer(TEXT)["input_ids"]])
    with torch.no_grad():
        without = base.model(input_ids=ids, use_cache=False).logits
        SlotModel(base.model, ",".join(adapter)).load([adapter])
        changed = base.model(input_ids=ids, use_cache=False).logits
    return float((changed - without).abs().max())
