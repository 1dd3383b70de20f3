"""``flexlora eval``: score a run's adapters or a PEFT folder on held-out rows."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from flexlora.clients.worker import Worker, worker_for
from flexlora.config.resolve import Config, resolved
from flexlora.errors import UserError
from flexlora.evaluation.evaluate import BASE
from flexlora.lora.adapters import Adapter
from flexlora.lora.peft_config import read_config
from flexlora.lora.peft_folder import load_adapter
from flexlora.report.console import make_console
from flexlora.runs.folder import RunFolder
from flexlora.runs.sources import Sources, check_same, read_origin
from flexlora.server.strategy import FlexLoRAStrategy
from flexlora.simulations.scoring import held_out_scores

__all__ = ["check_sources", "evaluate_target"]

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
    given = Config.given(file=file, sets=sets)
    found = _target(Path(target), base_given="model.name" in given)
    adapters, values = found.adapters, dict(found.values)
    values |= {"eval.split": "test", "eval.max-examples": 0}
    # Nothing is trained here, perhaps on another machine than the one that did.
    values |= {"train.optim": "adamw_torch", "model.attn-implementation": "auto"}
    if data is not None:
        # Who holds which row does not matter here: all rows of the folder, as one client's.
        values |= {"data.path": data, "data.name": "", "data.partition": "iid", "clients.count": 1}
        values |= {"clients.quantization": ""}
    values |= given
    config = resolved(Config.of(values))
    worker = worker_for(config)
    now, model = _sources_now(found, config, worker), config.model.name
    check_sources(found.sources, now, target=target, model=model, allow_changed=allow_changed)
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


def _target(path: Path, *, base_given: bool) -> _Target:
    """The adapters behind a path.

    Raises:
        UserError: neither a run nor a PEFT folder, or a revision of the base that is not loaded.
    """
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
    stored = read_config(path / "adapter_config.json")
    base = stored.base or "embedded"
    if stored.revision not in ("", "main") and not base_given:
        raise UserError(
            f"'{path}' was made on revision '{stored.revision}' of '{base}', which is not the one "
            "that is loaded; download it and give its folder as --set model.name=FOLDER."
        )
    values: dict[str, object] = {"model.name": base, "lora.target-modules": ",".join(adapter)}
    return _Target(adapters=adapters, values=values, sources=origin)


def _sources_now(found: _Target, config: Config, worker: Worker) -> Sources:
    """The base and, if the target was trained on these data, the rows that are evaluated."""
    now, rows = config.flat(), dict[str, str]()
    dealt = [key for key in now if key.startswith(("data.", "clients.")) or key in _DEALING]
    if all(found.values.get(key) == now[key] for key in dealt):
        rows[config.eval.split] = worker.data.digests()[config.eval.split]
    return Sources(base=worker.base.fingerprint, rows=rows)


def check_sources(
    before: Sources | None, now: Sources, *, target: str, model: str, allow_changed: bool
) -> None:
    """Refuse sources that have changed, or print what has changed where that is allowed."""
    notice = check_same(
        before, now, run=target, model=model, allowed=allow_changed, flag="--allow-changed"
    )
    if notice:
        print(f"flexlora: {notice}", file=sys.stderr)
