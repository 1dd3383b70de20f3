"""``flexlora simulate --seeds N``: one configuration under N seeds, with mean and deviation.

    OUT/seed-S      a run folder per seed: seed, seed + 1, ...
    OUT/seeds.json  the configuration, a row per finished seed, mean and sample deviation

A row is written when its run is complete. Resuming an interrupted series skips the seeds with a
row, resumes those with a checkpoint and starts the others.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console

from flexlora.config.resolve import Config, resolved
from flexlora.errors import UserError
from flexlora.report.formats import SCORES, TOTALS, format_metric
from flexlora.report.records import SERIES_FILE, RunRecords, read_run
from flexlora.report.text_table import text_table
from flexlora.runs.folder import RunFolder
from flexlora.simulations.simulate import run_in_terminal
from flexlora.wire.files import write_atomically

__all__ = ["SeedSeries", "is_series", "resume_series", "run_series", "scores_of", "summary_of"]

FORMAT = 1  # of seeds.json; the first version named none
NOT_SHARED = ("seed", "out")  # keys that differ between the runs of a series


def is_series(out: str | Path) -> bool:
    """Whether ``out`` is the folder of a series."""
    return (Path(out) / SERIES_FILE).is_file()


def run_series(
    config: Config, out: Path, *, seeds: int, console: Console, overwrite: bool = False
) -> int:
    """Run ``config`` under ``seeds`` seeds, except those already done in ``out``.

    Raises:
        UserError: fewer than two seeds, a folder in use, a series there with another
            configuration or first seed.
    """
    if seeds < 2:
        raise UserError(f"--seeds is {seeds}, expected at least 2; leave it out for a single run.")
    series = SeedSeries.of(config, out, seeds=seeds)
    if not is_series(out):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(
                f"output folder '{out}' already holds something that is not a series of seeds; "
                "give another --out."
            )
    elif overwrite:
        series.forget()
    else:
        series = series.continuing(SeedSeries.read(out))
    return series.run(console)


def resume_series(out: Path, *, console: Console, allow_changed: bool = False) -> int:
    """Resume the series in ``out`` with its stored configuration and number of seeds."""
    return SeedSeries.read(out).run(console, allow_changed=allow_changed)


@dataclass(kw_only=True)
class SeedSeries:
    """``seeds.json``: the configuration, the seeds and the scores of those that are done."""

    out: Path
    config: dict[str, object]
    first_seed: int
    seeds: int
    rows: dict[int, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Config, out: Path, *, seeds: int) -> SeedSeries:
        shared = {key: value for key, value in config.flat().items() if key not in NOT_SHARED}
        return cls(out=out, config=shared, first_seed=config.seed, seeds=seeds)

    @classmethod
    def read(cls, out: Path) -> SeedSeries:
        """The series in ``out``.

        Raises:
            UserError: ``seeds.json`` is damaged.
        """
        file = out / SERIES_FILE
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            if stored.get("format", FORMAT) != FORMAT:
                raise UserError(
                    f"'{file}' has format {stored['format']}, this FlexLoRA reads {FORMAT}; use "
                    "the FlexLoRA that wrote it."
                )
            return cls(
                out=out,
                config=dict(stored["config"]),
                first_seed=int(stored["first_seed"]),
                seeds=int(stored["seeds"]),
                rows={int(row["seed"]): dict(row["scores"]) for row in stored["rows"]},
            )
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
            raise UserError(f"'{file}' is damaged; remove it or give another --out.") from None

    def continuing(self, stored: SeedSeries) -> SeedSeries:
        """This series with the finished rows of ``stored``, the one on disk.

        Raises:
            UserError: ``stored`` is another series; one without a run is replaced.
        """
        if not any(RunFolder.is_run(folder) for folder in self.out.glob("seed-*")):
            return self
        mine, theirs = dict(self.config), dict(stored.config)
        if not mine["engine.threads"]:  # all of this machine's: fixed when the series began
            mine["engine.threads"] = theirs.get("engine.threads")
        mine["seed"], theirs["seed"] = self.first_seed, stored.first_seed
        for key in dict.fromkeys((*mine, *theirs)):
            if mine.get(key) != theirs.get(key):
                raise UserError(
                    f"'{self.out}' holds a series with {key} = {theirs.get(key)!r}, this one has "
                    f"{mine.get(key)!r}; give another --out, or --overwrite."
                )
        return replace(self, config=stored.config, rows=stored.rows)

    def forget(self) -> None:
        """Remove the checkpoints of an older series, so that its runs are replaced, not resumed."""
        for index in self.out.glob("seed-*/checkpoint/current.json"):
            index.unlink()

    @property
    def wanted(self) -> range:
        return range(self.first_seed, self.first_seed + self.seeds)

    def run(self, console: Console, *, allow_changed: bool = False) -> int:
        """Run the seeds that are not done, print the table, write ``seeds.json``."""
        threads = resolved(Config.of(self.config)).engine.threads
        self.config["engine.threads"] = threads
        self._write()
        for number, seed in enumerate(self.wanted, start=1):
            if seed in self.rows and RunFolder.is_run(self.out / f"seed-{seed}"):
                console.print(f"Seed {seed} ({number} of {self.seeds}): done before.")
                continue
            console.print(f"Seed {seed} ({number} of {self.seeds})", style="bold")
            self._run_seed(seed, console, allow_changed)
            console.print()
        for line in self._table(console.width):
            console.print(line, soft_wrap=True)
        console.print(f"\nNumbers: {self.out / SERIES_FILE}", soft_wrap=True)
        return 0

    def _run_seed(self, seed: int, console: Console, allow_changed: bool) -> None:
        folder = self.out / f"seed-{seed}"
        config = Config.of({**self.config, "seed": seed})
        begun = RunFolder.is_run(folder) and (folder / "checkpoint" / "current.json").is_file()
        run_in_terminal(
            config,
            folder,
            console=console,
            overwrite=True,
            go_on=begun,
            allow_changed=allow_changed,
        )
        self.rows[seed] = scores_of(read_run(folder))
        self._write()

    def _done(self) -> list[tuple[int, dict[str, float]]]:
        return [(seed, self.rows[seed]) for seed in self.wanted if seed in self.rows]

    def _table(self, width: int) -> list[str]:
        """A row per metric: mean, deviation and the value of every seed."""
        done = self._done()
        summary = summary_of([scores for _, scores in done])
        header = ["", "mean", "deviation", *(f"seed {seed}" for seed, _ in done)]
        rows = []
        for key, found in summary.items():
            values = [format_metric(_unprefixed(key), scores.get(key)) for _, scores in done]
            shown = (
                format_metric(_unprefixed(key), found[which]) for which in ("mean", "deviation")
            )
            rows.append([_title(key), *shown, *values])
        return [*text_table(header, rows, width=width, words=(True,))]

    def _write(self) -> None:
        stored = {
            "format": FORMAT,
            "config": self.config,
            "first_seed": self.first_seed,
            "seeds": self.seeds,
            "rows": [{"seed": seed, "scores": self.rows[seed]} for seed in sorted(self.rows)],
            "summary": summary_of([scores for _, scores in self._done()]),
        }
        text = json.dumps(stored, indent=1) + "\n"
        write_atomically(self.out / SERIES_FILE, text.encode())


def scores_of(run: RunRecords) -> dict[str, float]:
    """A run's scores: those of the base, scores of the last round, sums over its rounds."""
    keys = [*SCORES, *(f"{key}/{name}" for key in SCORES for name in run.rank_classes)]
    keys += [f"{key}/personal" for key in SCORES]
    found = {f"base/{key}": run.base(key) for key in SCORES} | {key: run.last(key) for key in keys}
    scores = {key: point[1] for key, point in found.items() if point is not None}
    totals = {key: run.total(key) for key in TOTALS}
    return scores | {key: value for key, value in totals.items() if value is not None}


def summary_of(rows: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    """Mean and sample deviation of every score over the seeds that have it."""
    summary: dict[str, dict[str, float | None]] = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        values = [row[key] for row in rows if key in row]
        summary[key] = {
            "mean": statistics.fmean(values),
            "deviation": statistics.stdev(values) if len(values) > 1 else None,
            "seeds": len(values),
        }
    return summary


def _unprefixed(key: str) -> str:
    return key.removeprefix("base/")


def _title(key: str) -> str:
    """``loss``, ``loss of the base``, ``loss, rank_8``."""
    name, _, rank_class = _unprefixed(key).partition("/")
    title = {**SCORES, **TOTALS}[name]
    if key.startswith("base/"):
        return f"{title} of the base"
    return f"{title}, {rank_class}" if rank_class else title
