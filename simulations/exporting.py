"""``flexlora export``: a run's global change or a PEFT folder, at any rank, in another form."""

from __future__ import annotations

from pathlib import Path

from flexlora.aggregation.aggregate import aggregate
from flexlora.config.resolve import Config
from flexlora.errors import UserError, nearest
from flexlora.lora.peft_config import read_config, read_json_object
from flexlora.lora.peft_folder import load_adapter
from flexlora.report.console import make_console
from flexlora.runs.folder import RunFolder
from flexlora.runs.sources import read_origin
from flexlora.simulations.export_forms import FORMS, Source, write_form

__all__ = ["export"]


def export(
    target: str,
    *,
    rank: int | None,
    kind: str,
    out: str,
    allow_changed: bool = False,
    dequantize: bool = False,
    dtype: str = "",
) -> None:
    """Write the best approximation at ``rank`` (None: all), or the base with it merged in.

    Raises:
        UserError: an unknown format, a rank below 1 or above the global one, neither a run nor a
            PEFT folder, a folder in use, a merge into another base than the adapter was trained on
            (unless ``allow_changed``), or what the format cannot hold.
    """
    if kind not in FORMS:
        listed = f"{', '.join(FORMS[:-1])} or {FORMS[-1]}"
        raise UserError(f"--format is '{kind}', expected {listed}.{nearest(kind, FORMS)}")
    if rank is not None and rank < 1:
        raise UserError(f"--rank is {rank}, expected a rank of at least 1.")
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"'{out}' already exists and is not empty; give another --out.")
    path = Path(target)
    found = _of_run(path, rank) if RunFolder.is_run(path) else _of_folder(path, rank)
    write_form(
        found,
        folder,
        form=kind,
        target=target,
        allow_changed=allow_changed,
        dequantize=dequantize,
        dtype=dtype,
    )
    make_console().print(f"{folder}: {found.text}", soft_wrap=True)


def _of_run(path: Path, rank: int | None) -> Source:
    """``T_rank(G)`` of a run."""
    run, config = RunFolder.open(path)
    state, _ = run.load_checkpoint()
    change, factoring = state.change, (config.lora.alpha, config.lora.rslora)
    _check_rank(rank, max(len(svd.S) for svd in change.values()), f"the global change of '{path}'")
    kept = change.total_energy_kept(dict.fromkeys(change, rank)) if rank else 1.0
    adapter = change.full_rank_adapter(factoring[0], rslora=factoring[1])
    if rank:
        adapter = change.adapter(rank, factoring[0], rslora=factoring[1], seed=config.seed)
    what = f"rank {rank}" if rank else "the whole change"
    return Source(
        adapter=adapter,
        model=config.model.name,
        dtype=config.model.dtype,
        quantization=_quantization(config),
        sources=run.sources(),
        fan_in_fan_out=_fan_in_fan_out(run),
        text=f"{what} of round {state.round}, {100 * kept:.2f} % of the energy.",
        run=path,
    )


def _check_rank(rank: int | None, largest: int, whose: str) -> None:
    if rank is not None and rank > largest:
        raise UserError(
            f"--rank is {rank}, and {whose} has rank {largest}; give at most {largest}, or leave "
            "--rank out for all of it."
        )


def _quantization(config: Config) -> str:
    used = {config.model.quantization, config.clients.quantization} - {"none", ""}
    return min(used, default="")


def _of_folder(path: Path, rank: int | None) -> Source:
    """The adapter of a PEFT folder, or its best approximation at ``rank``.

    Raises:
        UserError: it is none.
    """
    if not (path / "adapter_config.json").is_file():
        raise UserError(f"'{path}' is not a run folder and not a PEFT folder.")
    adapter, config = load_adapter(path), read_config(path / "adapter_config.json")
    _check_rank(rank, max(factors.rank for factors in adapter.values()), f"the adapter '{path}'")
    text = "the same products"
    if rank:
        change = aggregate([(adapter, 1)])
        kept = change.total_energy_kept(dict.fromkeys(change, rank))
        adapter = change.adapter(rank, float(rank))
        text = f"rank {rank}, {100 * kept:.2f} % of the energy"
    stored = read_json_object(path / "adapter_config.json")
    home = path.resolve().parent.parent
    of_run = path.resolve().parent.name == "adapters" and RunFolder.is_run(home)
    return Source(
        adapter=adapter,
        model=config.base,
        dtype="float32",
        quantization=_quantization(RunFolder.open(home)[1]) if of_run else "",
        sources=read_origin(path),
        fan_in_fan_out=bool(stored.get("fan_in_fan_out")),
        text=f"{text} as '{path}'.",
        run=home if of_run else None,
    )


def _fan_in_fan_out(run: RunFolder) -> bool:
    """As the run's own adapters say it; they are there unless the run was killed."""
    file = run.path / "adapters" / "global" / "adapter_config.json"
    return file.is_file() and bool(read_json_object(file).get("fan_in_fan_out"))
