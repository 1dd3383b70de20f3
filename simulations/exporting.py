"""``flexlora export``: a run's global change or a PEFT folder, at any rank, in another form."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from flexlora.aggregation.aggregate import aggregate
from flexlora.config.resolve import Config
from flexlora.deploy.adapter_checks import misfit
from flexlora.errors import UserError, nearest
from flexlora.lora.adapters import Adapter
from flexlora.lora.layouts import Layout
from flexlora.lora.peft_config import read_config, read_json_object
from flexlora.lora.peft_folder import load_adapter, save_adapter
from flexlora.report.console import make_console
from flexlora.runs.folder import RunFolder
from flexlora.runs.sources import Sources, read_origin, write_origin
from flexlora.simulations.inspection import check_sources
from flexlora.training.models import load_base, resolve_name

__all__ = ["export"]

LAYOUTS: dict[str, Layout] = {"portable": "portable", "peft": "compact"}


@dataclass(frozen=True, kw_only=True)
class _Source:
    """What is exported: the adapter, the base that it belongs to, a sentence about it."""

    adapter: Adapter
    model: str
    dtype: str
    quantization: str
    sources: Sources | None
    fan_in_fan_out: bool
    text: str


def export(
    target: str, *, rank: int | None, kind: str, out: str, allow_changed: bool = False
) -> None:
    """Write the best approximation at ``rank`` (None: all), or the base with it merged in.

    Raises:
        UserError: an unknown format, a rank below 1, neither a run nor a PEFT folder, a folder in
            use, or a merge into another base than the adapter was trained on (unless
            ``allow_changed`` and not quantized).
    """
    formats = (*LAYOUTS, "merged")
    if kind not in formats:
        listed = f"{', '.join(formats[:-1])} or {formats[-1]}"
        raise UserError(f"--format is '{kind}', expected {listed}.{nearest(kind, formats)}")
    if rank is not None and rank < 1:
        raise UserError(f"--rank is {rank}, expected a rank of at least 1.")
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"'{out}' already exists and is not empty; give another --out.")
    path = Path(target)
    found = _of_run(path, rank) if RunFolder.is_run(path) else _of_folder(path, rank)
    if kind == "merged":
        _write_merged(found, folder, target=target, allow_changed=allow_changed)
    else:
        save_adapter(
            found.adapter,
            folder,
            base=resolve_name(found.model),
            layout=LAYOUTS[kind],
            fan_in_fan_out=found.fan_in_fan_out,
        )
        if found.sources is not None:
            write_origin(folder, found.sources.base)
    make_console().print(f"{folder}: {found.text}", soft_wrap=True)


def _of_run(path: Path, rank: int | None) -> _Source:
    """``T_rank(G)`` of a run."""
    run, config = RunFolder.open(path)
    state, _ = run.load_checkpoint()
    change, factoring = state.change, (config.lora.alpha, config.lora.rslora)
    kept = change.total_energy_kept(dict.fromkeys(change, rank)) if rank else 1.0
    adapter = change.full_rank_adapter(factoring[0], rslora=factoring[1])
    if rank:
        adapter = change.adapter(rank, factoring[0], rslora=factoring[1], seed=config.seed)
    what = f"rank {rank}" if rank else "the whole change"
    return _Source(
        adapter=adapter,
        model=config.model.name,
        dtype=config.model.dtype,
        quantization=_quantization(config),
        sources=run.sources(),
        fan_in_fan_out=_fan_in_fan_out(run),
        text=f"{what} of round {state.round}, {100 * kept:.2f} % of the energy.",
    )


def _quantization(config: Config) -> str:
    used = {config.model.quantization, config.clients.quantization} - {"none", ""}
    return min(used, default="")


def _of_folder(path: Path, rank: int | None) -> _Source:
    """The adapter of a PEFT folder, or its best approximation at ``rank``.

    Raises:
        UserError: it is none.
    """
    if not (path / "adapter_config.json").is_file():
        raise UserError(f"'{path}' is not a run folder and not a PEFT folder.")
    adapter, config = load_adapter(path), read_config(path / "adapter_config.json")
    text = "the same products"
    if rank:
        change = aggregate([(adapter, 1)])
        kept = change.total_energy_kept(dict.fromkeys(change, rank))
        adapter = change.adapter(rank, float(rank))
        text = f"rank {rank}, {100 * kept:.2f} % of the energy"
    stored = read_json_object(path / "adapter_config.json")
    return _Source(
        adapter=adapter,
        model=config.base,
        dtype="float32",
        quantization="",
        sources=read_origin(path),
        fan_in_fan_out=bool(stored.get("fan_in_fan_out")),
        text=f"{text} as '{path}'.",
    )


def _fan_in_fan_out(run: RunFolder) -> bool:
    """As the run's own adapters say it; they are there unless the run was killed."""
    file = run.path / "adapters" / "global" / "adapter_config.json"
    return file.is_file() and bool(read_json_object(file).get("fan_in_fan_out"))


@torch.no_grad()
def _write_merged(found: _Source, folder: Path, *, target: str, allow_changed: bool) -> None:
    """``W + delta_weight`` in every target, written by transformers as safetensors."""
    if found.quantization:
        raise UserError(
            f"the adapter was trained on a {found.quantization} base; merged into the "
            "full-precision one it is another model. Use --format portable beside the same base."
        )
    base = load_base(found.model, dtype=found.dtype, device="cpu", fresh=True)
    now = Sources(base=base.fingerprint)
    check_sources(found.sources, now, target=target, model=base.name, allow_changed=allow_changed)
    if cause := misfit(found.adapter, base.model):
        raise UserError(f"'{target}' cannot be merged into '{base.name}': {cause}")
    for name, factors in found.adapter.items():
        delta = factors.delta_weight()
        linear = base.model.get_submodule(name)
        turned = delta.T if type(linear).__name__ == "Conv1D" else delta
        linear.weight.add_(turned.to(linear.weight.dtype))
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
