"""Runs every variant of a table on every seed and prints means and deviations over the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from flexlora.config.resolve import Config, resolved
from flexlora.runs.folder import RunFolder
from flexlora.simulations.experiments.request import Request
from flexlora.simulations.experiments.results import ResultsFile
from flexlora.simulations.experiments.variant_runs import RUNNERS
from flexlora.simulations.experiments.variants import STRONG, WEAK, Variant
from flexlora.simulations.simulate import simulate

__all__ = ["refuse_taken", "run_table", "run_variants", "summary_table", "with_gap_closed"]

MEASURED = {"eval.split": "test", "eval.max-examples": 0, "eval.every": 0, "eval.generate": "ends"}
TRIED = {"eval.split": "validation", "eval.every": 0, "eval.generate": "never", "seed": 1000}
TRIALS_FROM = 0.5  # below this scale no trials are run

Scores = Mapping[str, Any]


def run_variants(
    request: Request, variants: Sequence[Variant], measured: Mapping = MEASURED
) -> ResultsFile:
    """Run every variant on every seed, except those already in ``results.json``.

    Raises:
        UserError: ``--set`` of a key that a variant sets, or results of another experiment in
            ``out``.
    """
    refuse_taken(request, variants)
    results = request.results()
    for variant in variants:
        if len(variant.trials) > 1 and request.scale >= TRIALS_FROM:
            _choose_trial(request, results, variant)
    for seed in request.seeds:
        for variant in variants:
            if not results.has(variant.title, seed):
                _measure(request, results, variant, {**measured, "seed": seed})
    return results


def refuse_taken(request: Request, variants: Sequence[Variant]) -> None:
    """Raises ``UserError`` for a ``--set`` of a key that a variant sets."""
    taken = [key for variant in variants for key in variant.changes]
    request.refuse_taken([*taken, "seed", "eval.generate"])


def run_table(request: Request, variants: Sequence[Variant]) -> list[dict]:
    """Run the variants, print a table per part; returns the rows with ``gap closed`` added."""
    results = run_variants(request, variants)
    rows = with_gap_closed(variants, results.of_seeds(request.seeds))
    for part in dict.fromkeys(variant.part for variant in variants):
        # Within a part's table the titles need not repeat its name.
        titles = {v.title: v.title.removesuffix(f", {part}") for v in variants if v.part == part}
        shown = [{**r, "variant": titles[r["variant"]]} for r in rows if r["variant"] in titles]
        request.console.print()
        request.console.print(summary_table(list(titles.values()), shown, part))
    request.console.print(f"Numbers: {results.file}", soft_wrap=True)
    return rows


def _choose_trial(request: Request, results: ResultsFile, variant: Variant) -> None:
    """Run a variant's trials for half of the rounds and record the best; once only."""
    if results.chosen(variant.title):
        return
    losses = []
    for index, trial in enumerate(variant.trials):
        config = _config(request, variant, trial, fixed=TRIED, usual={})
        rounds = max(1, config.num_server_rounds // 2)
        config = resolved(config.with_values({"num-server-rounds": rounds}))
        out = request.out / "trials" / f"{slug(variant.title)}-{index}"
        simulate(config, out, overwrite=True)
        losses.append(RunFolder(out).metrics()[-1]["eval_loss"])
    results.choose(variant.title, variant.trials, losses)
    spelled = ", ".join(f"{loss:.3f}" for loss in losses)
    text = f"{variant.title}: {results.chosen(variant.title)} of {spelled}"
    request.console.print(text, soft_wrap=True)


def _measure(request: Request, results: ResultsFile, variant: Variant, measured: Mapping) -> None:
    """Run one variant on one seed and record its scores."""
    title, seed = variant.title, measured["seed"]
    trial = results.chosen(title) or variant.trials[len(variant.trials) // 2]
    config = resolved(_config(request, variant, trial, fixed={"seed": seed}, usual=measured))
    scores = RUNNERS[variant.kind](config, request.out / "runs" / f"{slug(title)}-{seed}")
    results.add(title, seed, scores)
    numbers = {key: value for key, value in scores.items() if isinstance(value, float)}
    spelled = ", ".join(f"{key} {value:.3f}" for key, value in numbers.items())
    request.console.print(f"seed {seed}, {title}: {spelled}", soft_wrap=True)


def _config(
    request: Request, variant: Variant, trial: Mapping, *, fixed: Mapping, usual: Mapping
) -> Config:
    """``usual``, sizes, ``--set``, the variant, its trial, ``fixed``: a later one overrides."""
    sizes = request.default_sizes()
    return Config.of({**usual, **sizes, **request.given, **variant.changes, **trial, **fixed})


def with_gap_closed(variants: Sequence[Variant], rows: Sequence[Scores]) -> list[dict]:
    """The rows with ``gap closed``: the part of the loss gap that the variant closes on that seed.

        closed = mean(weak - loss) / mean(weak - strong)

    A row holds ``(weak - loss) / mean(weak - strong)``: the numerator of its seed over the mean
    gap of all seeds that have both ends. The mean over a variant's rows is a ratio of means, which
    a seed with a very small gap cannot dominate as it does a mean of ratios. The deviation is that
    of ``weak - loss`` over seeds, in units of the mean gap.
    """
    part = {variant.title: variant.part for variant in variants}
    end = {variant.title: variant.end for variant in variants if variant.end}
    ends = {
        (part[row["variant"]], end[row["variant"]], row["seed"]): row["loss"]
        for row in rows
        if row["variant"] in end
    }
    gaps: dict[str, list[float]] = {}
    for (name, kind, seed), weak in ends.items():
        if kind == WEAK and (name, STRONG, seed) in ends:
            gaps.setdefault(name, []).append(weak - ends[name, STRONG, seed])
    result = []
    for row in rows:
        name, seed = part.get(row["variant"], ""), row["seed"]
        gap = statistics.fmean(gaps.get(name, [0.0]))
        result.append(dict(row))
        if "loss" in row and gap and {(name, WEAK, seed), (name, STRONG, seed)} <= ends.keys():
            result[-1]["gap closed"] = (ends[name, WEAK, seed] - row["loss"]) / gap
    return result


def summary_table(titles: Sequence[str], rows: Sequence[Scores], part: str = "") -> Table:
    """Mean and standard deviation over seeds of every score, one row per variant.

    Scores by rank class are left out where the variants differ in their classes and the table is
    about the gap.
    """
    keys = _columns(rows)
    table = Table(box=None, pad_edge=False, title_justify="left")
    table.add_column(part or "exact match on test rows", no_wrap=True)
    for key in keys:
        table.add_column(key, justify="right", no_wrap=True)
    for title in titles:
        of_title = [row for row in rows if row["variant"] == title]
        cells = (_cell(key, [row[key] for row in of_title if key in row]) for key in keys)
        table.add_row(title, *cells)
    return table


def _columns(rows: Sequence[Scores]) -> list[str]:
    columns = dict.fromkeys(key for row in rows for key in row if key not in ("variant", "seed"))
    others = [key for key in columns if not key.startswith("rank_")]
    if "gap closed" in columns:
        return others
    classes = [key for key in columns if key.startswith("rank_")]
    return [*sorted(classes, key=lambda key: int(key.split("_")[1])), *others]


def _cell(key: str, values: Sequence[float]) -> str:
    """``mean±deviation``; megabytes without deviation, since they hardly vary over seeds."""
    if not values:
        return ""
    mean = statistics.fmean(values)
    if key.startswith("MB"):
        return f"{mean:.0f}" if mean >= 20 else f"{mean:.1f}"
    digits = 3 if key == "loss" else 2
    deviation = f"±{statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{deviation}"


def slug(title: str) -> str:
    """A title as the name of a folder."""
    return "-".join("".join(c if c.isalnum() else " " for c in title.lower()).split())
