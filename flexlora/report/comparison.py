"""The table of ``flexlora compare``: the settings in which runs differ, and their results.

Scores are comparable on the same held-out rows: if the settings that choose the rows agree, and the
rows of each client in ``evaluation.csv``. Over another base, whose tokenizer may cut the rows into
other tokens, a loss per token is not; bits per byte are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flexlora.config.resolve import KEYS
from flexlora.errors import UserError
from flexlora.report.formats import SCORES, TOTALS, format_metric, format_setting
from flexlora.report.records import RunRecords, read_run

__all__ = ["Cell", "Column", "Comparison", "compared", "read_runs"]

# The keys that choose which held-out rows are scored, and their text.
ROW_KEYS: tuple[str, ...] = ("seed", "clients.count", "data.path", "data.tasks", "data.name")
ROW_KEYS += ("data.partition", "data.dirichlet-alpha", "data.template", "train.max-length")
ROW_KEYS += ("eval.split", "eval.fraction", "eval.max-examples")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The text of a cell and its exact number; ``derived`` for a sum over rows."""

    shown: str
    value: float | None = None
    derived: bool = False


@dataclass(frozen=True, kw_only=True)
class Column:
    title: str
    cells: tuple[Cell, ...]
    words: bool = False
    setting: bool = False


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A column per difference and per result, a row per run, and notes on what is comparable.

    ``comparable``: all runs were scored on the same rows over the same base.
    """

    names: tuple[str, ...]
    columns: tuple[Column, ...]
    notes: tuple[str, ...]
    comparable: bool = True


def read_runs(paths: Sequence[str | Path]) -> list[RunRecords]:
    """The runs to compare.

    Raises:
        UserError: fewer than two, one named twice, a folder that is no run, or a run in which no
            round of training is done.
    """
    if len(paths) < 2:
        given = f"got one run, '{paths[0]}'" if paths else "got no run"
        raise UserError(f"compare {given}, expected at least two run folders; name another.")
    places = [Path(path).resolve() for path in paths]
    for index, place in enumerate(places):
        if place in places[:index]:
            raise UserError(f"compare got '{paths[index]}' twice, expected different run folders.")
    runs = [read_run(path) for path in paths]
    for run in runs:
        if run.last_round < 1:
            raise UserError(
                f"'{run.path}' has finished no round of training, expected at least one; "
                "wait for it or leave it out."
            )
    return runs


def compared(runs: Sequence[RunRecords]) -> Comparison:
    """The table of ``runs``, in their order."""
    names = tuple(_names(runs))
    rows, notes = _held_out(runs)
    notes += _bases(runs)
    columns = [_setting(runs, key) for key in _differing(runs)] + rows + [_rounds(runs)]
    columns += [_score(runs, key, title) for key, title in SCORES.items()]
    columns += [_total(runs, key, title) for key, title in TOTALS.items()]
    columns += _class_losses(runs)
    shown = tuple(column for column in columns if any(cell.shown for cell in column.cells))
    if unfinished := [name for name, run in zip(names, runs, strict=True) if not run.finished]:
        notes += [f"Not finished, scores so far: {', '.join(unfinished)}."]
    comparable = not rows
    return Comparison(names=names, columns=shown, notes=tuple(notes), comparable=comparable)


def _names(runs: Sequence[RunRecords]) -> list[str]:
    """The last parts of each path, as many as make the names distinct."""
    paths = [run.path.resolve().parts for run in runs]
    for depth in range(1, max(len(parts) for parts in paths)):
        names = ["/".join(parts[-depth:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return [str(run.path) for run in runs]


def _differing(runs: Sequence[RunRecords]) -> list[str]:
    """Keys whose values differ between runs, in the order of the options."""
    known = [key for key in KEYS if key != "out"]
    others = sorted({key for run in runs for key in run.config} - KEYS.keys())
    keys = [*known, *others]

    def differs(key: str) -> bool:
        foreign = key.startswith("method.")  # a run whose method lacks the option has no value
        having = [run for run in runs if key in run.config or not foreign]
        return len({_shown_setting(run, key) for run in having}) > 1

    return [key for key in keys if differs(key)]


def _setting(runs: Sequence[RunRecords], key: str) -> Column:
    cells = tuple(Cell(shown=_shown_setting(run, key)) for run in runs)
    return Column(title=key, cells=cells, words=True, setting=True)


def _shown_setting(run: RunRecords, key: str) -> str:
    return format_setting(run.setting(key) if key in KEYS else run.config.get(key, "(not set)"))


def _rounds(runs: Sequence[RunRecords]) -> Column:
    cells = []
    for run in runs:
        of = "" if run.finished else f" of {run.num_rounds}"
        cells.append(Cell(shown=f"{run.last_round}{of}", value=run.last_round))
    return Column(title="rounds", cells=tuple(cells))


def _score(runs: Sequence[RunRecords], key: str, title: str) -> Column:
    ends = [run.last(key) for run in runs]
    values = [None if end is None else end[1] for end in ends]
    return Column(
        title=title, cells=tuple(Cell(shown=format_metric(key, v), value=v) for v in values)
    )


def _total(runs: Sequence[RunRecords], key: str, title: str) -> Column:
    totals = [run.total(key) for run in runs]
    cells = (Cell(shown=format_metric(key, v), value=v, derived=True) for v in totals)
    return Column(title=title, cells=tuple(cells))


def _class_losses(runs: Sequence[RunRecords]) -> list[Column]:
    """The loss of every rank class, where all runs have the same classes and more than one."""
    classes = runs[0].rank_classes
    if len(classes) < 2 or any(run.rank_classes != classes for run in runs):
        return []
    return [_score(runs, f"eval_loss/{name}", f"loss {name}") for name in classes]


def _held_out(runs: Sequence[RunRecords]) -> tuple[list[Column], list[str]]:
    """A letter per set of held-out rows and a note on the differing keys; empty if all agree."""
    kinds = [_rows_of(run) for run in runs]
    letters = {kind: _letter(index) for index, kind in enumerate(dict.fromkeys(kinds))}
    if len(letters) == 1:
        return [], []
    keys = [key for key in ROW_KEYS if len({_shown_setting(run, key) for run in runs}) > 1]
    cause = ", ".join(keys) or "evaluation.csv names other clients or other numbers of rows"
    note = (
        f"Scored on other rows ({cause}): "
        "compare scores only within one letter of the column 'rows'."
    )
    cells = tuple(Cell(shown=letters[kind]) for kind in kinds)
    return [Column(title="rows", cells=cells, words=True)], [note]


def _bases(runs: Sequence[RunRecords]) -> list[str]:
    """A note where the runs have several bases."""
    names = dict.fromkeys(_shown_setting(run, "model.name") for run in runs)
    if len(names) < 2:
        return []
    return [
        f"Scored over other bases ({', '.join(names)}): compare their bits/byte, since a loss per "
        "token depends on the tokenizer."
    ]


def _rows_of(run: RunRecords) -> tuple[object, ...]:
    """A key that is equal for runs scored on the same held-out rows."""
    settings = tuple(_shown_setting(run, key) for key in ROW_KEYS)
    scored: Mapping[str, str] = {row["client_id"]: row["rows"] for row in run.evaluations}
    return settings, tuple(sorted(scored.items()))


def _letter(index: int) -> str:
    """A to Z, then A2 to Z2."""
    return chr(ord("A") + index % 26) + (str(index // 26 + 1) if index >= 26 else "")
