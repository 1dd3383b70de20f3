"""``flexlora eval --tasks lm_eval:...``: adapters on tasks of lm-evaluation-harness.

The base and all adapters are slots of one model (``evaluation/harness.py``): every request is
answered for all of them in one pass. Differences from the base are paired over documents.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from flexlora.config.paths import expanded
from flexlora.config.resolve import Config
from flexlora.errors import UserError, nearest, one_line
from flexlora.evaluation.bootstrap import LEVEL, RESAMPLES, paired_ratios
from flexlora.evaluation.evaluate import BASE
from flexlora.lora.adapters import Adapter
from flexlora.report.text_table import text_table
from flexlora.simulations.score_tables import difference_text
from flexlora.training.models import BaseModel
from flexlora.training.slots import slot_model

__all__ = ["parse_tasks", "print_task_scores", "task_scores"]

SUITES = ("lm_eval",)
STDERR_RESAMPLES = 1000


def parse_tasks(text: str) -> list[str]:
    """The names and paths in ``lm_eval:arc_easy,tasks/own.yaml``.

    Raises:
        UserError: another suite, no task, a path that does not exist, or no ``lm_eval``.
    """
    suite, colon, listed = text.partition(":")
    if not colon or suite not in SUITES:
        raise UserError(
            f"--tasks is '{text}', expected 'lm_eval:' and names of tasks or YAML files, as "
            f"lm_eval:arc_easy,hellaswag.{nearest(suite, SUITES)}"
        )
    names = [expanded(name.strip()) for name in listed.split(",") if name.strip()]
    if not names:
        raise UserError("--tasks names no task, expected some, as lm_eval:arc_easy,hellaswag.")
    for name in names:
        if _is_path(name) and not Path(name).is_file():
            raise UserError(f"--tasks: the file '{name}' does not exist; name a task's YAML file.")
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "--tasks needs lm-evaluation-harness, and it is not installed; run "
            "'pip install flexlora[lm-eval]'."
        )
    return names


def task_scores(
    base: BaseModel, adapters: Mapping[str, Adapter], names: Sequence[str], config: Config
) -> dict[str, Any]:
    """The harness' results by adapter, the base first, and differences from the base.

    ``eval.max-examples`` bounds the documents of a task, ``eval.batch-size`` the rows of a pass;
    with ``data.template=chat`` requests are turns under the tokenizer's chat template.

    Raises:
        UserError: an unknown task, one that cannot be loaded or scored greedily, adapters of
            unequal modules.
    """
    from flexlora.evaluation.harness import SlotLM, base_slot

    tasks = _load(names)
    slots = slot_model(base.model, config.lora.target_modules)
    first = next(iter(adapters.values()))
    try:
        slots.load([base_slot(first), *adapters.values()])
    except ValueError as error:
        raise UserError(f"the adapter does not fit the base: {error}") from None
    lm = SlotLM(slots, base, batch_size=config.eval.batch_size)
    found = {}
    try:
        for lm.slot, name in enumerate([BASE, *adapters]):
            found[name] = _evaluate(lm, tasks, config)
    finally:
        slots.clear()
    return {
        "bootstrap": {
            "unit": "document",
            "resamples": RESAMPLES,
            "level": LEVEL,
            "seed": config.seed,
        },
        "adapters": {name: result["results"] for name, result in found.items()},
        "versions": found[BASE]["versions"],
        "differences": [
            row
            for name in adapters
            for row in _differences(found[name], found[BASE], name, config.seed)
        ],
    }


def _is_path(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) or "/" in name


def _load(names: Sequence[str]) -> Any:
    """The harness' tasks; only those that need a data set of the hub open a connection."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=not all(_is_path(name) for name in names))
    for name in names:
        if not _is_path(name) and name not in manager.all_tasks:
            raise UserError(
                f"lm_eval has no task '{name}', expected one of its {len(manager.all_tasks)} or "
                f"the path of a YAML file.{nearest(name, manager.all_tasks)}"
            )
    try:
        return manager.load(list(names))
    except Exception as error:  # whatever a task's file, its code or the hub's client raises
        raise UserError(
            f"lm_eval cannot load {', '.join(names)} ({one_line(error)}); check the task's file "
            "and the connection, if its data set is on the hub."
        ) from error


def _evaluate(lm: Any, tasks: Any, config: Config) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate

    try:
        found: Any = evaluate(
            lm,
            tasks,
            limit=config.eval.max_examples or None,
            bootstrap_iters=STDERR_RESAMPLES,
            apply_chat_template=config.data.template == "chat",
        )
    except UserError:
        raise
    except (ValueError, NotImplementedError) as error:  # unsafe code, images, a metric
        raise UserError(f"lm_eval refuses the tasks ({one_line(error)}).") from error
    return found


def _differences(
    found: Mapping[str, Any], against: Mapping[str, Any], name: str, seed: int
) -> list[dict[str, Any]]:
    """Of every metric that is a mean over documents, and of bits per byte."""
    rows = []
    for task, samples in found["samples"].items():
        theirs = {(s["doc_id"], s["filter"]): s for s in against["samples"][task]}
        pairs = [(s, theirs[s["doc_id"], s["filter"]]) for s in samples]
        for key in found["results"].get(task, {}):
            metric, _, kind = key.partition(",")
            of = [(a, b) for a, b in pairs if a["filter"] == kind and metric in a]
            sums = [_sums(a[metric], b[metric]) for a, b in of]
            if not sums or any(row is None for row in sums):
                continue
            constant = -1 / math.log(2) if metric == "bits_per_byte" else 1.0
            difference = paired_ratios(np.array(sums, dtype=float), seed=seed, constant=constant)
            rows.append(
                {"adapter": name, "against": BASE, "task": task, "metric": key}
                | {**vars(difference), "documents": difference.clients}
            )
            del rows[-1]["clients"]
    return rows


def _sums(ours: Any, theirs: Any) -> tuple[float, float, float, float] | None:
    """Totals and weights of one document under both; None for what is no ratio of sums."""
    if isinstance(ours, bool | int | float | np.number):
        return float(ours), 1.0, float(theirs), 1.0
    if isinstance(ours, tuple | list) and len(ours) == 2:
        pair = (*ours, *theirs)
        if all(isinstance(value, int | float) for value in pair):
            return tuple(map(float, pair))  # type: ignore[return-value]
    return None


def print_task_scores(report: Mapping[str, Any], console: Console) -> None:
    """A row per task and metric: every adapter's value, and its difference from the base."""
    adapters = report["adapters"]
    found = {(r["adapter"], r["task"], r["metric"]): r for r in report["differences"]}
    others = [name for name in adapters if name != BASE]
    header = ["task", "metric", *adapters, *(f"{name} - {BASE}" for name in others)]
    rows = []
    for task, values in adapters[BASE].items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, int | float) or not kind:
                continue
            shown = metric if kind == "none" else f"{metric} ({kind})"
            rows.append(
                [
                    *(task, shown),
                    *(_with_error(adapters[name].get(task, {}), metric, kind) for name in adapters),
                    *(difference_text(found.get((name, task, key))) for name in others),
                ]
            )
    for line in text_table(header, rows, width=console.width, words=[True, True]):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _with_error(values: Mapping[str, Any], metric: str, kind: str) -> str:
    value, error = values.get(f"{metric},{kind}"), values.get(f"{metric}_stderr,{kind}")
    if not isinstance(value, int | float):
        return ""
    return f"{value:.4f}" + (f" ± {error:.4f}" if isinstance(error, int | float) else "")
