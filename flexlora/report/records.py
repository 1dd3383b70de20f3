"""A run folder in memory, read without a model, torch or Flower.

The run may be in progress or its files truncated: an incomplete last line is left out, and so are
rows of a round that is not in ``metrics.jsonl`` yet.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from flexlora.config.paths import expanded
from flexlora.config.resolve import KEYS, read_toml
from flexlora.errors import UserError
from flexlora.printable import from_cell
from flexlora.runs.metrics_file import missing_files, read_rounds
from flexlora.runs.samples_file import Samples, read_samples

__all__ = ["SERIES_FILE", "RunRecords", "finite", "read_run"]

SERIES_FILE = "seeds.json"
# The columns that are read here and in the pages; later versions have added others.
EVALUATIONS: tuple[str, ...] = ("round", "client_id", "rank_class", "eval_loss")
CLIENTS: tuple[str, ...] = (
    *("round", "client_id", "rank_class", "rank", "quantization", "device"),
    *("num_examples", "status", "cause"),
)
PERSONAL = "personal"  # a suffix of metrics (clients with personal factors), not a rank class


def finite(value: object) -> float | None:
    """``value`` if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None


@dataclass(frozen=True, kw_only=True)
class RunRecords:
    """One run: its rounds, its rows and its configuration by dotted key.

    ``evaluations`` are those of the first and of the last evaluated round. ``classes`` has the rank
    class of every client in the checkpoint, by client id. ``samples`` is ``samples.json``.
    """

    path: Path
    config: Mapping[str, object]
    environment: Mapping[str, object]
    rounds: tuple[Mapping[str, object], ...]
    clients: tuple[Mapping[str, str], ...]
    evaluations: tuple[Mapping[str, str], ...]
    classes: Mapping[str, Mapping[str, object]]
    samples: Samples | None = None

    @property
    def last_round(self) -> int:
        """The last finished round: 0 is the base, -1 is none at all."""
        return max((at for at, _ in self.points("round")), default=-1)

    @property
    def num_rounds(self) -> int:
        """The configured number of rounds, and one for each that is held again.

        A run whose privacy budget is spent has no more than it held.
        """
        if self.budget_spent:
            return self.last_round
        wanted = finite(self.setting("num-server-rounds"))
        again = sum(bool(row.get("held_again")) for row in self.rounds)
        return int(wanted) + again if wanted is not None else max(self.last_round, 0)

    @property
    def budget_spent(self) -> str:
        """Why the privacy budget allows no further round; empty where it does."""
        return str(self.rounds[-1].get("budget_spent", "")) if self.rounds else ""

    @property
    def finished(self) -> bool:
        return self.last_round >= self.num_rounds

    @cached_property
    def rank_classes(self) -> list[str]:
        """The rank classes that any round names, the smaller rank first."""
        keys = dict.fromkeys(key for row in self.rounds for key in row)
        names = [k.partition("/")[2] for k in keys if k.startswith(("eval_loss/", "energy_kept/"))]
        names += [row["rank_class"] for row in self.clients if row["rank_class"]]
        others = (PERSONAL, f"global_of_{PERSONAL}")
        return sorted(dict.fromkeys(name for name in names if name not in others), key=_natural)

    def setting(self, key: str) -> object:
        """The run's value of a key; the default if an older version did not write it."""
        return self.config.get(key, KEYS[key].default)

    def points(self, key: str) -> list[tuple[int, float]]:
        """``(round, value)`` of every round that has a number under ``key``."""
        found = ((int(str(row["round"])), finite(row.get(key))) for row in self.rounds)
        return [(at, value) for at, value in found if value is not None]

    def base(self, key: str) -> tuple[int, float] | None:
        """``(0, value)`` of ``key`` before any training."""
        return next((point for point in self.points(key) if point[0] == 0), None)

    def last(self, key: str) -> tuple[int, float] | None:
        """``(round, value)`` of ``key`` in the last round of training that has it."""
        return next((point for point in reversed(self.points(key)) if point[0] > 0), None)

    def last_modules(self) -> tuple[int, dict[str, Mapping[str, object]]]:
        """``(round, {module: its numbers})`` of the last round that has them; 0 and none."""
        return next(reversed(self.modules()), (0, {}))

    def modules(self) -> list[tuple[int, dict[str, Mapping[str, object]]]]:
        """The same of every round that has them."""
        found = []
        for row in self.rounds:
            modules = row.get("modules")
            if isinstance(modules, Mapping) and modules:
                kept = {k: v for k, v in modules.items() if isinstance(v, Mapping)}
                found.append((int(str(row["round"])), kept))
        return found

    def total(self, key: str) -> float | None:
        """The sum over all rounds; None where no round has it."""
        values = [value for _, value in self.points(key)]
        return sum(values) if values else None

    def client_loss(self, server_round: int) -> dict[str, float]:
        """Held-out loss of every client in one round, under the adapter of its own rank class."""
        classes = self._classes_after(server_round)
        losses = {
            row["client_id"]: cell_number(row["eval_loss"])
            for row in self.evaluations
            if int(row["round"]) == server_round
            and row["rank_class"] in ("base", classes.get(row["client_id"]))
        }
        return {client: loss for client, loss in losses.items() if loss is not None}

    def _classes_after(self, server_round: int) -> dict[str, str]:
        """Each client's rank class when its rows were scored at the end of a round.

        That is the class of its next training, else the checkpoint's, else that of its last row,
        which may be from before a change of rank.
        """
        rows = [row for row in self.clients if row["rank_class"]]
        classes = {row["client_id"]: row["rank_class"] for row in rows}
        classes |= {client: str(given.get("name")) for client, given in self.classes.items()}
        later = [row for row in rows if int(row["round"]) > server_round]
        return classes | {row["client_id"]: row["rank_class"] for row in reversed(later)}


def cell_number(text: str) -> float | None:
    """A cell of a CSV table as a number, None where it is empty."""
    try:
        return finite(float(text))
    except ValueError:
        return None


def read_run(path: str | Path) -> RunRecords:
    """The run in the folder ``path``.

    Raises:
        UserError: it is a series of seeds or no run folder, or a file is damaged.
    """
    path = Path(expanded(str(path)))
    if (path / SERIES_FILE).is_file():
        runs = sorted((folder.name for folder in path.glob("seed-*")), key=_natural)
        named = f", such as {path / runs[0]}" if runs else ""
        raise UserError(f"'{path}' is a series of seeds, expected one run{named}.")
    if missing := missing_files(path):
        raise UserError(f"'{path}' is not a run folder: {missing}.")
    rounds = tuple(read_rounds(path / "metrics.jsonl"))
    last = max((int(row["round"]) for row in rounds), default=-1)
    return RunRecords(
        path=path,
        config=read_toml(path / "config.toml"),
        environment=_json_object(path / "environment.json"),
        rounds=rounds,
        clients=tuple(_table(path / "clients.csv", last, CLIENTS)),
        evaluations=tuple(_first_and_last(_table(path / "evaluation.csv", last, EVALUATIONS))),
        classes=_classes(path / "checkpoint" / "current.json"),
        samples=read_samples(path, last),
    )


def _table(file: Path, last_round: int, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """Complete rows of rounds up to ``last_round``, with these columns and any others.

    Raises:
        UserError: a table without a column that every run has written.
    """
    try:
        reader = csv.reader(io.StringIO(_text(file), newline=""))
        names = next(reader, None) or list(columns)
        if missing := [name for name in columns if name not in names]:
            raise UserError(f"'{file}' is damaged: it has no column '{missing[0]}'.")
        at = names.index("round")
        for row in reader:
            number = row[at] if len(row) == len(names) else ""
            if number.isdecimal() and len(number) < 10 and int(number) <= last_round:
                yield dict(zip(names, map(from_cell, row), strict=True))
    except csv.Error as error:
        raise UserError(f"'{file}' cannot be read as a table: {error}.") from None


def _first_and_last(rows: Iterable[dict[str, str]]) -> Iterator[dict[str, str]]:
    """The rows of the first and the last evaluated round: all of them can fill gigabytes."""
    first, last = list[dict[str, str]](), list[dict[str, str]]()
    for row in rows:
        if not first or row["round"] == first[0]["round"]:
            first.append(row)
        elif last and row["round"] != last[0]["round"]:
            last = [row]
        else:
            last.append(row)
    yield from first
    yield from last


def _classes(file: Path) -> dict[str, dict]:
    """The rank class of each client in the checkpoint's index; none before the first checkpoint."""
    classes = _json_object(file).get("rank_classes") if file.is_file() else None
    if not isinstance(classes, dict):
        return {}
    return {str(client): given for client, given in classes.items() if isinstance(given, dict)}


def _json_object(file: Path) -> dict[str, object]:
    try:
        found = json.loads(_text(file))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"'{file}' is damaged: {error}.") from None
    if not isinstance(found, dict):
        raise UserError(f"'{file}' holds {type(found).__name__}, expected an object of keys.")
    return found


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8", errors="replace") if file.is_file() else ""
    except OSError as error:
        raise UserError(f"'{file}' cannot be read: {error.strerror}.") from None


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts ``rank_2`` before ``rank_16``."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]
