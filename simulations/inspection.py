"""``flexlora eval`` and ``flexlora export``: score adapters, write one rank of a run's change."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from rich.table import Table

from flexlora.clients.worker import worker_for
from flexlora.config.resolve import Config, resolved
from flexlora.errors import UserError, nearest
from flexlora.evaluation.evaluate import BASE
from flexlora.lora.adapters import Adapter
from flexlora.lora.peft_config import read_config, read_json_object
from flexlora.lora.peft_folder import load_adapter, save_adapter
from flexlora.report.console import make_console
from flexlora.runs.folder import RunFolder
from flexlora.server.strategy import FlexLoRAStrategy
from flexlora.simulations.scoring import held_out_scores
from flexlora.training.models import load_base, resolve_name

__all__ = ["evaluate_target", "export_run"]


def evaluate_target(
    target: str, *, data: str | None = None, file: str | None = None, sets: tuple[str, ...] = ()
) -> int:
    """Print loss, exact match and ROUGE-L of a run's rank classes, or of one PEFT folder.

    Beside the base, on all rows of the ``test`` split (``--set eval.split=validation`` for the
    other) of all clients.

    Raises:
        UserError: neither a run nor a PEFT folder, or data and model that do not fit it.
    """
    given = Config.given(file=file, sets=sets)
    adapters, values = _adapters_of(Path(target), base_given="model.name" in given)
    values |= {"eval.split": "test", "eval.max-examples": 0}
    # Nothing is trained here, perhaps on another machine than the one that did.
    values |= {"train.optim": "adamw_torch", "model.attn-implementation": "auto"}
    if data is not None:
        # Who holds which row does not matter here: all rows of the folder, as one client's.
        values |= {"data.path": data, "data.name": "", "data.partition": "iid", "clients.count": 1}
        values |= {"clients.quantization": ""}
    values |= given
    worker = worker_for(resolved(Config.of(values)))
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


def _adapters_of(path: Path, *, base_given: bool) -> tuple[dict[str, Adapter], dict[str, object]]:
    """Adapters by name, and the configuration that they were made under.

    Raises:
        UserError: neither a run nor a PEFT folder, or a revision of the base that is not loaded.
    """
    if RunFolder.is_run(path):
        run, config = RunFolder.open(path)
        state, classes = run.load_checkpoint()
        used = {r.name: r for r in sorted(classes.values(), key=lambda r: (r.rank, r.name))}
        strategy = FlexLoRAStrategy(config)
        return strategy.served(state, used), config.flat()
    if not path.is_dir():
        raise UserError(f"'{path}' does not exist, expected a run folder or a PEFT folder.")
    adapter, name = load_adapter(path), path.resolve().name
    name = f"{name} (adapter)" if name == BASE else name
    home = path.resolve().parent.parent
    if path.resolve().parent.name == "adapters" and RunFolder.is_run(home):
        return {name: adapter}, RunFolder.open(home)[1].flat()
    made = read_config(path / "adapter_config.json")
    base = made.base or "embedded"
    if made.revision not in ("", "main") and not base_given:
        raise UserError(
            f"'{path}' was made on revision '{made.revision}' of '{base}', which is not the one "
            "that is loaded; download it and give its folder as --set model.name=FOLDER."
        )
    return {name: adapter}, {"model.name": base, "lora.target-modules": ",".join(adapter)}


def export_run(target: str, *, rank: int, kind: str, out: str) -> None:
    """Write ``T_rank(G)`` of a run as a PEFT folder, or the base with it merged in.

    Raises:
        UserError: an unknown format, a rank below 1, a folder in use, or a merge into another base
            than the adapter was trained on.
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
    else:
        _save_merged(
            config, {n: svd.truncate(rank).to_dense() for n, svd in change.items()}, folder
        )
    kept = change.total_energy_kept(dict.fromkeys(change, rank))
    text = f"{folder}: rank {rank} of round {state.round}, {100 * kept:.2f} % of the energy."
    console.print(text, soft_wrap=True)


def _fan_in_fan_out(run: RunFolder) -> bool:
    """As the run's own adapters say it; they are there unless the run was killed."""
    file = run.path / "adapters" / "global" / "adapter_config.json"
    return file.is_file() and bool(read_json_object(file).get("fan_in_fan_out"))


@torch.no_grad()
def _save_merged(config: Config, deltas: Mapping[str, torch.Tensor], folder: Path) -> None:
    """``W + T_rank(G)`` in every target, written by transformers as safetensors."""
    base = load_base(config.model.name, dtype=config.model.dtype, device="cpu", fresh=True)
    for name, delta in deltas.items():
        linear = base.model.get_submodule(name)
        turned = delta.T if type(linear).__name__ == "Conv1D" else delta
        linear.weight.add_(turned.to(linear.weight.dtype))
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
