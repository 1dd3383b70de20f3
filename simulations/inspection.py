"""``flexlora eval``: score a run's adapters or a PEFT folder on held-out rows."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flexlora.clients.worker import Worker, worker_for
from flexlora.config.resolve import Config, resolved
from flexlora.data.held_out import check_held_out
from flexlora.data.sources import load_folder
from flexlora.errors import UserError
from flexlora.evaluation.evaluate import BASE
from flexlora.lora.adapters import Adapter
from flexlora.lora.peft_config import read_config
from flexlora.lora.peft_folder import load_adapter
from flexlora.report.console import make_console
from flexlora.runs.folder import RunFolder
from flexlora.runs.outcomes import Outcome
from flexlora.runs.sources import Sources, check_same, read_origin
from flexlora.server.strategy import FlexLoRAStrategy
from flexlora.simulations.score_report import score_report
from flexlora.simulations.score_tables import print_scores
from flexlora.simulations.scoring import cells_of
from flexlora.simulations.task_scores import parse_tasks, print_task_scores, task_scores
from flexlora.training.models import load_base
from flexlora.training.personal_store import PersonalStore
from flexlora.wire.files import write_atomically

__all__ = ["check_sources", "evaluate_target"]

_DEALING = ("seed", "population.examples")  # beside data.* and clients.*: who holds which rows


def evaluate_target(
    target: str,
    *,
    data: str | None = None,
    file: str | None = None,
    sets: tuple[str, ...] = (),
    allow_changed: bool = False,
    json_file: str | None = None,
    tasks: str | None = None,
) -> int:
    """Print the scores of a run's rank classes, or of one PEFT folder; write them as JSON too.

    Beside the base, on all rows of the ``test`` split (``--set eval.split=validation`` for the
    other) of all clients, those included that the run has not trained with. With ``tasks``, as
    ``lm_eval:arc_easy``, on those tasks instead (``task_scores.py``).

    Raises:
        UserError: neither a run nor a PEFT folder, data and model that do not fit it, or another
            base or other rows than it was trained on (unless ``allow_changed``).
    """
    names = parse_tasks(tasks) if tasks else []
    if names and data is not None:
        raise UserError("--tasks and --data both say what to score on, expected one of them.")
    given = Config.given(file=file, sets=sets)
    found = _target(Path(target), base_given="model.name" in given)
    adapters, values = found.adapters, dict(found.values)
    values |= {"eval.split": "test", "eval.max-examples": 0, "eval.generate": "ends"}
    # Nothing is trained here, perhaps on another machine than the one that did.
    values |= {"train.optim": "adamw_torch", "model.attn-implementation": "auto"}
    if data is not None:
        values |= {"data.path": data, "data.name": "", "clients.quantization": ""}
        values |= {"data.held-out-tasks": "", "clients.held-out": 0.0}
        values |= _dealt(data)
    values |= given
    if names:
        values |= {"data.template": "auto"}  # of the tasks: no chat template unless asked for
        config = resolved(Config.of(values | given))
        report = _on_tasks(found, names, config, target=target, allow_changed=allow_changed)
        print_task_scores(report, make_console())
        return _written(json_file, report)
    config = resolved(Config.of(values))
    worker = worker_for(config)
    check_held_out(worker.rows, config.data.held_out_tasks)
    now, model = _sources_now(found, config, worker), config.model.name
    check_sources(found.sources, now, target=target, model=model, allow_changed=allow_changed)
    cells = cells_of(
        worker,
        adapters,
        classes=found.classes,
        trained=found.trained if data is None else frozenset(),
        personal=found.personal if data is None else None,
        server_round=found.server_round,
    )
    scores = score_report(cells, seed=config.seed)
    print_scores(scores, make_console())
    return _written(json_file, scores)


def _written(file: str | None, scores: Mapping[str, Any]) -> int:
    """Write ``--json`` where it is given."""
    try:
        if file:
            write_atomically(Path(file), (json.dumps(scores, indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"--json '{file}' cannot be written: {error.strerror}.") from None
    return 0


def _on_tasks(
    found: _Target, names: list[str], config: Config, *, target: str, allow_changed: bool
) -> dict[str, Any]:
    """Scores on tasks of a suite, which need the base and no rows."""
    torch.set_num_threads(config.engine.threads)
    base = load_base(
        config.model.name,
        dtype=config.model.dtype,
        quantization=config.model.quantization,
        outlier_threshold=config.model.outlier_threshold,
        attention=config.model.attn_implementation,
        device=config.engine.device,
    )
    now, model = Sources(base=base.fingerprint, rows={}), config.model.name
    check_sources(found.sources, now, target=target, model=model, allow_changed=allow_changed)
    return task_scores(base, found.adapters, names, config)


def _dealt(data: str) -> dict[str, object]:
    """Rows of a folder by their clients where all name one, for intervals; else as one client's."""
    rows = [row for split in load_folder(data).values() for row in split]
    if all(row.client is not None for row in rows):
        return {"data.partition": "client", "clients.count": 0}
    return {"data.partition": "iid", "clients.count": 1}


@dataclass(frozen=True, kw_only=True)
class _Target:
    """Adapters by name, the configuration and the sources that they were trained with.

    Of a run also the clients that trained (None: unknown), the rank class of each client, and the
    clients' personal factors after ``server_round``.
    """

    adapters: dict[str, Adapter]
    values: dict[str, object]
    sources: Sources | None
    trained: frozenset[str] | None = None
    classes: Mapping[str, str] = field(default_factory=dict)
    personal: PersonalStore | None = None
    server_round: int = 0


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
        folder = run.path / "personal"
        return _Target(
            adapters=served,
            values=config.flat(),
            sources=run.sources(),
            trained=_trained(run),
            classes={client_id: given.name for client_id, given in classes.items()},
            personal=PersonalStore(folder) if folder.is_dir() else None,
            server_round=state.round,
        )
    if not path.is_dir():
        raise UserError(f"'{path}' does not exist, expected a run folder or a PEFT folder.")
    adapter, name = load_adapter(path), path.resolve().name
    adapters = {f"{name} (adapter)" if name == BASE else name: adapter}
    origin, home = read_origin(path), path.resolve().parent.parent
    if path.resolve().parent.name == "adapters" and RunFolder.is_run(home):
        run, config = RunFolder.open(home)
        sources, trained = run.sources() or origin, _trained(run)
        return _Target(adapters=adapters, values=config.flat(), sources=sources, trained=trained)
    stored = read_config(path / "adapter_config.json")
    base = stored.base or "embedded"
    if stored.revision not in ("", "main") and not base_given:
        raise UserError(
            f"'{path}' was made on revision '{stored.revision}' of '{base}', which is not the one "
            "that is loaded; download it and give its folder as --set model.name=FOLDER."
        )
    values: dict[str, object] = {"model.name": base, "lora.target-modules": ",".join(adapter)}
    return _Target(adapters=adapters, values=values, sources=origin)


def _trained(run: RunFolder) -> frozenset[str]:
    """The clients whose updates any round of the run has taken."""
    return frozenset(r["client_id"] for r in run.client_rows() if r["status"] == Outcome.OK.status)


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
