"""A series: every arm of a table for every seed, kept after each run, then mean and deviation."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from flexlora.config.resolve import Config, resolved
from flexlora.runs.folder import RunFolder
from flexlora.simulations.experiments.arm_runs import RUNNERS
from flexlora.simulations.experiments.arms import STRONG, WEAK, Arm
from flexlora.simulations.experiments.asked import Asked
from flexlora.simulations.experiments.figures import arms_figure
from flexlora.simulations.experiments.results import KeptResults
from flexlora.simulations.simulate import simulate

__all__ = ["refuse_taken", "run_arms", "run_table", "summary_table", "with_gap_closed"]

MEASURED = {"eval.split": "test", "eval.max-examples": 0, "eval.every": 0, "eval.generate": "ends"}
TRIED = {"eval.split": "validation", "eval.every": 0, "eval.generate": "never", "seed": 1000}
TRIALS_FROM = 0.5  # the scale below which nothing is tried out

Row = Mapping[str, Any]


def run_arms(asked: Asked, arms: Sequence[Arm], measured: Mapping = MEASURED) -> KeptResults:
    """Run every arm on every seed, those that are in ``results.json`` already left out.

    Raises:
        UserError: ``--set`` of a key that an arm decides, or numbers of another series in ``out``.
    """
    refuse_taken(asked, arms)
    series = Series(asked=asked, kept=asked.kept(), measured=measured)
    for arm in arms:
        series.try_out(arm)
    for seed in asked.seeds:
        for arm in arms:
            series.measure(arm, seed)
    return series.kept


def refuse_taken(asked: Asked, arms: Sequence[Arm]) -> None:
    """Raises ``UserError`` for a ``--set`` of a key that an arm decides."""
    asked.refuse_taken([*(key for arm in arms for key in arm.changes), "seed", "eval.generate"])


def run_table(asked: Asked, arms: Sequence[Arm]) -> list[dict]:
    """``run_arms``, and a table and a figure per part; the rows, each with the gap it closes."""
    kept = run_arms(asked, arms)
    rows = with_gap_closed(arms, kept.of_seeds(asked.seeds))
    for part in dict.fromkeys(arm.part for arm in arms):
        _print_part(asked, [arm for arm in arms if arm.part == part], rows, part)
    asked.console.print(f"Numbers: {kept.file}", soft_wrap=True)
    return rows


@dataclass(frozen=True, kw_only=True)
class Series:
    """What the arms of one call share: what was asked, what is kept, how results are measured."""

    asked: Asked
    kept: KeptResults
    measured: Mapping[str, object]

    def try_out(self, arm: Arm) -> None:
        """Run the trials of an arm that has a choice, and keep what each came to."""
        if len(arm.trials) < 2 or self.kept.chosen(arm.title) or self.asked.scale < TRIALS_FROM:
            return
        losses = []
        for index, trial in enumerate(arm.trials):
            config = self._config(arm, trial, TRIED)
            rounds = max(1, config.num_server_rounds // 2)
            config = resolved(config.with_values({"num-server-rounds": rounds}))
            out = self.asked.out / "trials" / f"{slug(arm.title)}-{index}"
            simulate(config, out, overwrite=True)
            losses.append(RunFolder(out).metrics()[-1]["eval_loss"])
        self.kept.choose(arm.title, arm.trials, losses)
        spelled = ", ".join(f"{loss:.3f}" for loss in losses)
        text = f"{arm.title}: {self.kept.chosen(arm.title)} of {spelled}"
        self.asked.console.print(text, soft_wrap=True)

    def measure(self, arm: Arm, seed: int) -> None:
        """Run one arm on one seed, unless its numbers are there."""
        if self.kept.has(arm.title, seed):
            return
        untried = arm.trials[len(arm.trials) // 2]
        best = self.kept.chosen(arm.title) or untried
        config = resolved(self._config(arm, best, {"seed": seed}, self.measured))
        scores = RUNNERS[arm.kind](config, self.asked.out / "runs" / f"{slug(arm.title)}-{seed}")
        self.kept.add(arm.title, seed, scores)
        numbers = {key: value for key, value in scores.items() if isinstance(value, float)}
        spelled = ", ".join(f"{key} {value:.3f}" for key, value in numbers.items())
        self.asked.console.print(f"seed {seed}, {arm.title}: {spelled}", soft_wrap=True)

    def _config(self, arm: Arm, trial: Row, last: Row, first: Row | None = None) -> Config:
        """The later word is the stronger: sizes, ``--set``, the arm, its trial, ``last``."""
        sizes, given = self.asked.default_sizes(), self.asked.given
        return Config.of({**(first or {}), **sizes, **given, **arm.changes, **trial, **last})


def with_gap_closed(arms: Sequence[Arm], rows: Sequence[Row]) -> list[dict]:
    """Each row with what its seed adds to the part of the gap in loss that its arm closes.

        closed = mean(weak - loss) / mean(weak - strong)

    A row holds ``(weak - loss) / mean(weak - strong)``: its own seed's numerator over the mean gap
    of all seeds that have both ends. The mean of an arm's rows is the ratio of means, which a seed
    with hardly a gap cannot turn over as it can a mean of ratios. Their deviation is that of
    ``weak - loss`` over seeds in units of the mean gap: at the strong end, how the gap itself
    varies.
    """
    part = {arm.title: arm.part for arm in arms}
    end = {arm.title: arm.end for arm in arms if arm.end}
    ends = {
        (part[row["arm"]], end[row["arm"]], row["seed"]): row["loss"]
        for row in rows
        if row["arm"] in end
    }
    gaps: dict[str, list[float]] = {}
    for (own, kind, seed), weak in ends.items():
        if kind == WEAK and (own, STRONG, seed) in ends:
            gaps.setdefault(own, []).append(weak - ends[own, STRONG, seed])
    result = []
    for row in rows:
        own, seed = part.get(row["arm"], ""), row["seed"]
        gap = statistics.fmean(gaps.get(own, [0.0]))
        result.append(dict(row))
        if "loss" in row and gap and {(own, WEAK, seed), (own, STRONG, seed)} <= ends.keys():
            result[-1]["gap closed"] = (ends[own, WEAK, seed] - row["loss"]) / gap
    return result


def _print_part(asked: Asked, arms: Sequence[Arm], rows: Sequence[Row], part: str) -> None:
    """The table and the figure of one part, whose name the titles need not repeat there."""
    short = {arm.title: arm.title.removesuffix(f", {part}") for arm in arms}
    rows = [{**row, "arm": short[row["arm"]]} for row in rows if row["arm"] in short]
    titles = list(short.values())
    asked.console.print()
    asked.console.print(summary_table(titles, rows, part))
    figure = asked.out / f"{slug(f'{asked.name} {part}')}.svg"
    label = "exact match on test rows, each client at its own rank (dots: seeds)"
    drawn = arms_figure(titles, rows, key="all clients", label=label, file=figure)
    hint = f"Figure: {figure}" if drawn else "No figure: pip install 'flexlora[figures]'."
    asked.console.print(hint, soft_wrap=True)


def summary_table(titles: Sequence[str], rows: Sequence[Row], part: str = "") -> Table:
    """Mean and standard deviation over seeds of every score, one row per arm.

    Scores by rank class are left out where the arms differ in their classes and the table is
    about the gap.
    """
    keys = _columns(rows)
    table = Table(box=None, pad_edge=False, title_justify="left")
    table.add_column(part or "exact match on test rows", no_wrap=True)
    for key in keys:
        table.add_column(key, justify="right", no_wrap=True)
    for title in titles:
        own = [row for row in rows if row["arm"] == title]
        table.add_row(title, *(_cell(key, [r[key] for r in own if key in r]) for key in keys))
    return table


def _columns(rows: Sequence[Row]) -> list[str]:
    columns = dict.fromkeys(key for row in rows for key in row if key not in ("arm", "seed"))
    others = [key for key in columns if not key.startswith("rank_")]
    if "gap closed" in columns:
        return others
    classes = [key for key in columns if key.startswith("rank_")]
    return [*sorted(classes, key=lambda key: int(key.split("_")[1])), *others]


def _cell(key: str, values: Sequence[float]) -> str:
    """``mean±deviation``; megabytes without, since they hardly differ between seeds."""
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
