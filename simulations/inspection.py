"""``flexlora eval`` and ``flexlora export``: score adapters, write one rank of a run's change."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

from flexlora.clients.worker import Worker, worker_for
from flexlora.config.resolve import Config, resolved
from flexlora.errors import UserError, nearest
from flexlora.evaluation.evaluate import BASE
from flexlora.lora.adapters import Adapter
from flexlora.lora.peft_folder import load_adapter, save_adapter
from flexlora.report.console import make_console
from flexlora.runs.folder import RunFolder
from flexlora.runs.sources import Sources, check_same, read_origin, write_origin
from flexlora.server.strategy import FlexLoRAStrategy
from flexlora.simulations.scoring import held_out_scores
from flexlora.training.models import BaseModel, load_base, resolve_name

__all__ = ["evaluate_target", "export_run"]

_DEALING = ("seed", "population.examples")  # beside data.* and clients.*: who holds which rows


def evaluate_target(
    target: str,
    *,
    data: str | None = None,
    file: str | None = None,
    sets: tuple[str, ...] = (),
    allow_changed: bool = False,
) -> int:
    """Print loss, exact match and ROUGE-L of a run's rank classes, or of one PEFT folder.

    Beside the base, on all rows of the ``test`` split (``--set eval.split=validation`` for the
    other) of all clients.

    Raises:
        UserError: neither a run nor a PEFT folder, data and model that do not fit it, or another
            base or other rows than it was trained on (unless ``allow_changed``).
    """
    found = _target(Path(target))
    adapters, values = found.adapters, dict(found.values)
    values |= {"eval.split": "test", "eval.max-examples": 0}
    # Nothing is trained here, perhaps on another machine than the one that did.
    values |= {"train.optim": "adamw_torch", "model.attn-implementation": "auto"}
    if data is not None:
        # Who holds which row does not matter here: all rows of the folder, as one client's.
        values |= {"data.path": data, "data.name": "", "data.partition": "iid", "clients.count": 1}
        values |= {"clients.quantization": ""}
    values |= Config.given(file=file, sets=sets)
    config = resolved(Config.of(values))
    worker = worker_for(config)
    _check_sources(found, config, worker, target, allow_changed)
    scores = held_out_scores(worker, {}) | held_out_scores(worker, adapters)
    table = Table(box=None, pad_edge=False)
    for column in ("adapter", "loss", "exact match", "ROUGE-L", "rows"):
        table.add_column(column, justify="left" if column == "adapter" else "right")
    for name, score in scores.items():
        table.add_row(
            name,
            f"{score.loss / score.tokens:.4f}",
            f"{score.exact_match / score.generated:.3f}",
            f"{score.rouge_l / score.generated:.3f}",
            str(score.rows),
        )
    make_console().print(table)
    return 0


@dataclass(frozen=True, kw_only=True)
class _Target:
    """Adapters by name, the configuration and the sources that they were trained with."""

    adapters: dict[str, Adapter]
    values: dict[str, object]
    sources: Sources | None


def _target(path: Path) -> _Target:
    if RunFolder.is_run(path):
        run, config = RunFolder.open(path)
        state, classes = run.load_checkpoint()
        used = {r.name: r for r in sorted(classes.values(), key=lambda r: (r.rank, r.name))}
        served = FlexLoRAStrategy(config).served(state, used)
        return _Target(adapters=served, values=config.flat(), sources=run.sources())
    if not path.is_dir():
        raise UserError(f"'{path}' does not exist, expected a run folder or a PEFT folder.")
    adapter, name = load_adapter(path), path.resolve().name
    adapters = {f"{name} (adapter)" if name == BASE else name: adapter}
    origin, home = read_origin(path), path.resolve().parent.parent
    if path.resolve().parent.name == "adapters" and RunFolder.is_run(home):
        run, config = RunFolder.open(home)
        return _Target(adapters=adapters, values=config.flat(), sources=run.sources() or origin)
    stored = _peft_config(path)
    base = str(stored.get("base_model_name_or_path") or "embedded")
    values: dict[str, object] = {"model.name": base, "lora.target-modules": ",".join(adapter)}
    return _Target(adapters=adapters, values=values, sources=origin)


def _check_sources(
    found: _Target, config: Config, worker: Worker, name: str, allow_changed: bool
) -> None:
    """Compare the base and, where they are the run's own, the rows that are evaluated."""
    now, rows = config.flat(), dict[str, str]()
    dealt = [key for key in now if key.startswith(("data.", "clients.")) or key in _DEALING]
    if all(found.values.get(key) == now[key] for key in dealt):
        rows[config.eval.split] = worker.data.digests()[config.eval.split]
    told = check_same(
        found.sources,
        Sources(base=worker.base.fingerprint, rows=rows),
        run=name,
        model=config.model.name,
        allowed=allow_changed,
        flag="--allow-changed",
    )
    if told:
        print(f"flexlora: {told}", file=sys.stderr)


def _peft_config(folder: Path) -> dict:
    """``adapter_config.json``, which ``load_adapter`` has read once."""
    file = folder / "adapter_config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"'{file}' cannot be read: {error}.") from None
    if not isinstance(found, dict):
        raise UserError(f"'{file}' holds {type(found).__name__}, expected an object of keys.")
    return found


def export_run(target: str, *, rank: int, kind: str, out: str, allow_changed: bool = False) -> None:
    """Write ``T_rank(G)`` of a run as a PEFT folder, or the base with it merged in.

    Raises:
        UserError: an unknown format, a rank below 1, a folder in use, or a merge into another base
            than the adapter was trained on (unless ``allow_changed`` and not quantized).
    """
    formats = ("peft", "merged")
    if kind not in formats:
        raise UserError(f"--format is '{kind}', expected peft or merged.{nearest(kind, formats)}")
    if rank < 1:
        raise UserError(f"--rank is {rank}, expected a rank of at least 1.")
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"'{out}' already exists and is not empty; give another --out.")
    run, config = RunFolder.open(target)
    state, _ = run.load_checkpoint()
    change, console = state.change, make_console()
    quantized = {config.model.quantization, config.clients.quantization} - {"none", ""}
    if kind == "merged" and quantized:
        raise UserError(
            f"the adapter was trained on a {min(quantized)} base; merged into the "
            "full-precision one it is another model. Use --format peft beside the same base."
        )
    base = resolve_name(config.model.name)
    if kind == "peft":
        adapter = change.adapter(
            rank, config.lora.alpha, rslora=config.lora.rslora, seed=config.seed
        )
        save_adapter(adapter, folder, base=base, fan_in_fan_out=_fan_in_fan_out(run))
        if (sources := run.sources()) is not None:
            write_origin(folder, sources.base)
    else:
        loaded = load_base(config.model.name, dtype=config.model.dtype, device="cpu", fresh=True)
        told = check_same(
            run.sources(),
            Sources(base=loaded.fingerprint),
            run=target,
            model=config.model.name,
            allowed=allow_changed,
            flag="--allow-changed",
        )
        if told:
            print(f"flexlora: {told}", file=sys.stderr)
        _save_merged(
            loaded, {n: svd.truncate(rank).to_dense() for n, svd in change.items()}, folder
        )
    kept = change.total_energy_kept(dict.fromkeys(change, rank))
    text = f"{folder}: rank {rank} of round {state.round}, {100 * kept:.2f} % of the energy."
    console.print(text, soft_wrap=True)


def _fan_in_fan_out(run: RunFolder) -> bool:
    """As the run's own adapters say it; they are there unless the run was killed."""
    folder = run.path / "adapters" / "global"
    there = (folder / "adapter_config.json").is_file()
    return there and bool(_peft_config(folder).get("fan_in_fan_out", False))


@torch.no_grad()
def _save_merged(base: BaseModel, deltas: Mapping[str, torch.Tensor], folder: Path) -> None:
    """``W + T_rank(G)`` in every target, written by transformers as safetensors."""
    for name, delta in deltas.items():
        linear = base.model.get_submodule(name)
        turned = delta.T if type(linear).__name__ == "Conv1D" else delta
        linear.weight.add_(turned.to(linear.weight.dtype))
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
