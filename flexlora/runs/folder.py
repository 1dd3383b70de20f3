"""The run folder: all files that a run writes and a resume reads.

config.toml       the resolved configuration, enough to repeat the run
metrics.jsonl     one object per round; round 0 is the base before any training
clients.csv       per round and client: rank, loss before and after, bytes, seconds, status, cause
evaluation.csv    per round and client: held-out loss and scores
environment.json  versions, seed, commit, machine
adapters/CLASS/   PEFT folders, one per rank class, and ``global``
checkpoint/       the server's state after the last complete rounds (``checkpoints.py``), and what
                  it was trained on (``sources.py``)
audit.jsonl       who contributed what to which checkpoint, a chain of hashes (``audit.py``)
canaries.json     of an audited simulation: its canaries and their scores (``canary_file.py``)
live.json         progress and liveness of the writing process (``live_state.py``)
samples.json      answers to a few held-out prompts, of a simulation that generates
trackers.json     of a run with ``report-to``: its ids there; ``tensorboard/`` has its event files
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import tomli_w
from safetensors import SafetensorError

from flexlora.aggregation.engine.state import State
from flexlora.config.paths import expanded
from flexlora.config.resolve import Config, of_older, read_toml
from flexlora.errors import UserError
from flexlora.lora.ranks import RankClass
from flexlora.printable import from_cell, to_cell
from flexlora.runs.audit import AUDIT_FILE, AuditLog
from flexlora.runs.canary_file import CANARY_FILE
from flexlora.runs.checkpoints import load_checkpoint, load_notes, save_checkpoint
from flexlora.runs.live_state import LIVE_FILE
from flexlora.runs.lock import check_idle
from flexlora.runs.metrics_file import missing_files, read_rounds
from flexlora.runs.samples_file import SAMPLES_FILE
from flexlora.runs.sources import Sources
from flexlora.wire.files import write_atomically

__all__ = ["CLIENT_COLUMNS", "TENSORBOARD", "TRACKERS_FILE", "RunFolder"]

TRACKERS_FILE, TENSORBOARD = "trackers.json", "tensorboard"

CLIENT_COLUMNS: tuple[str, ...] = ("round", "client_id", "rank_class", "rank", "quantization")
CLIENT_COLUMNS += ("device", "num_examples", "loss_before", "loss_after", "bytes_down", "bytes_up")
CLIENT_COLUMNS += ("seconds", "simulated_seconds", "joules", "status", "cause")
EVALUATION_COLUMNS: tuple[str, ...] = ("round", "client_id", "rank_class", "eval_loss")
EVALUATION_COLUMNS += ("eval_exact_match", "eval_rouge_l", "rows")
_TABLES = {"clients.csv": CLIENT_COLUMNS, "evaluation.csv": EVALUATION_COLUMNS}
_OURS = ("config.toml", "metrics.jsonl", "clients.csv", "checkpoint", "adapters", "personal")
_REPLACED = (
    *_OURS,
    "evaluation.csv",
    "environment.json",
    "report.html",
    LIVE_FILE,
    AUDIT_FILE,
    CANARY_FILE,
    SAMPLES_FILE,
    TRACKERS_FILE,
    TENSORBOARD,
)


class RunFolder:
    """One run on disk. A round's rows are appended when it is done, before its checkpoint."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(expanded(str(path)))
        self.audit = AuditLog(self.path / AUDIT_FILE)

    @classmethod
    def create(cls, path: str | Path, config: Config, *, overwrite: bool = False) -> RunFolder:
        """Create a folder with ``config.toml`` and ``environment.json``.

        Raises:
            UserError: see ``check_free``; the folder cannot be written.
        """
        run = cls(path)
        cls.check_free(run.path, overwrite=overwrite)
        for name in _REPLACED:
            _remove(run.path / name)
        nested = {k: v for k, v in config.nested().items() if k != "out"}
        environment = json.dumps(_environment(config), indent=1, sort_keys=True) + "\n"
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            write_atomically(run.path / "config.toml", tomli_w.dumps(nested).encode())
            write_atomically(run.path / "environment.json", environment.encode())
        except OSError as error:
            _remove(run.path / "config.toml")  # a partial run folder would block the next run
            raise UserError(f"output folder '{path}' cannot be made: {error.strerror}.") from None
        return run

    @staticmethod
    def is_run(path: Path) -> bool:
        """Whether ``path`` has the files of a run folder."""
        return not missing_files(path)

    @staticmethod
    def check_free(path: Path, *, overwrite: bool) -> None:
        """Refuse to write a run to ``path`` if that would delete data.

        Raises:
            UserError: the folder has rounds and ``overwrite`` is off, another process writes it,
                it has other contents than a run, which are never deleted, or cannot be made.
        """
        if not path.exists():
            above = next(parent for parent in path.absolute().parents if parent.exists())
            if not above.is_dir() or not os.access(above, os.W_OK):
                cause = "cannot be written to" if above.is_dir() else "is not a folder"
                raise UserError(f"output folder '{path}' cannot be made: '{above}' {cause}.")
            return
        if path.is_dir() and not any(path.iterdir()):
            return
        is_run = RunFolder.is_run(path)
        no_rounds = not (path / "metrics.jsonl").exists()
        if is_run and (overwrite or no_rounds):
            check_idle(path)
            return
        kind, advice = "something that is not a run", "give another --out"
        if is_run:
            kind, advice = "a run", f"{advice}, --resume {path}, or --overwrite"
        raise UserError(f"output folder '{path}' already holds {kind}; {advice}.")

    @classmethod
    def open(cls, path: str | Path) -> tuple[RunFolder, Config]:
        """An existing run and its configuration.

        Raises:
            UserError: it is not a run folder.
        """
        run = cls(path)
        if not cls.is_run(run.path):
            raise UserError(f"'{path}' is not a run folder: {missing_files(run.path)}.")
        return run, Config.of(of_older(read_toml(run.path / "config.toml")))

    def append_round(
        self,
        metrics: Mapping[str, object],
        clients: Sequence[Mapping[str, object]],
        evaluations: Sequence[Mapping[str, object]],
    ) -> None:
        """Append one line of ``metrics.jsonl`` and the rows of the two tables.

        Raises:
            UserError: they cannot be written; a resume deletes partial rows.
        """
        line = json.dumps({k: _json_number(v) for k, v in metrics.items()})
        with self.writing(f"round {metrics['round']}"):
            self._append_csv("clients.csv", clients)
            self._append_csv("evaluation.csv", evaluations)
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def metrics(self) -> list[dict]:
        """The rounds so far, without an incomplete last line.

        Raises:
            UserError: a complete line cannot be parsed.
        """
        return read_rounds(self.path / "metrics.jsonl")

    def client_rows(self) -> list[dict[str, str]]:
        """The complete rows of ``clients.csv``."""
        return self._rows("clients.csv")

    def _rows(self, name: str) -> list[dict[str, str]]:
        try:
            text = (self.path / name).read_bytes().decode("utf-8", errors="replace")
            rows = list(csv.DictReader(io.StringIO(text, newline="")))
        except FileNotFoundError:
            return []
        except (OSError, csv.Error) as error:
            raise UserError(f"'{self.path / name}' cannot be read as a table: {error}.") from None
        return [
            {column: from_cell(cell) for column, cell in row.items()}
            for row in rows
            if _is_count(row.get("round") or "") and None not in row and None not in row.values()
        ]

    def rewind(self, last_round: int) -> None:
        """Delete rows after ``last_round``, left by a crash between a round and its checkpoint.

        Raises:
            UserError: the folder cannot be written to.
        """
        rounds = [row for row in self.metrics() if row["round"] <= last_round]
        lines = "".join(json.dumps(row) + "\n" for row in rounds)
        with self.writing("what is left of an unfinished round"):
            write_atomically(self.path / "metrics.jsonl", lines.encode())
            for name, columns in _TABLES.items():
                if not (self.path / name).is_file():
                    continue
                rows = [row for row in self._rows(name) if int(row["round"]) <= last_round]
                text = _csv_text(columns, rows, header=True)
                write_atomically(self.path / name, text.encode())

    def save_checkpoint(
        self,
        folder: Path,
        state: State,
        rank_classes: Mapping[str, RankClass],
        notes: Mapping[str, Any] | None = None,
        *,
        keep: int = 1,
        before_commit: Callable[[str], None] | None = None,
    ) -> None:
        """Write the server's state after a round, see ``checkpoints.save_checkpoint``.

        Raises:
            UserError: it cannot be written; the previous one is unchanged.
        """
        with self.writing(f"the state after round {state.round}"):
            save_checkpoint(
                folder, state, rank_classes, notes, keep=keep, before_commit=before_commit
            )

    @contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Turn a failed write of ``what`` (mostly: the disk is full) into a ``UserError``."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"{what} cannot be written to '{self.path}': {reason}; the rounds before are "
                "whole: make room on that disk, then resume the run."
            ) from None

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

    def load_notes(self) -> dict:
        """The notes of the last checkpoint."""
        return load_notes(self.checkpoint)

    def sources(self) -> Sources | None:
        """The base and the rows of the last checkpoint; None if an older version wrote it."""
        stored = self.load_notes().get("sources")
        return Sources.from_dict(stored) if isinstance(stored, Mapping) else None

    def load_checkpoint(
        self, server_round: int | None = None
    ) -> tuple[State, dict[str, RankClass]]:
        """The server's state and the rank class of each client, now or after a kept round."""
        return load_checkpoint(self.checkpoint, server_round)

    def _append_csv(self, name: str, rows: Sequence[Mapping[str, object]]) -> None:
        file = self.path / name
        if not rows and file.exists():
            return
        with file.open("a", encoding="utf-8", newline="") as handle:
            handle.write(_csv_text(_TABLES[name], rows, header=handle.tell() == 0))


def _csv_text(columns: Sequence[str], rows: Sequence[Mapping[str, object]], *, header: bool) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows({c: _cell(row.get(c, "")) for c in columns} for row in rows)
    return text.getvalue()


def _cell(value: object) -> object:
    if isinstance(value, str):
        return to_cell(value)
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value


def _json_number(value: object) -> object:
    """``value`` with None for NaN and infinity at any depth, since JSON has neither."""
    if isinstance(value, Mapping):
        return {key: _json_number(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


def _environment(config: Config) -> dict[str, object]:
    """Versions, seed, commit and machine."""
    versions: dict[str, str | None] = {}
    for package in ("flexlora", "flwr", "torch", "transformers", "bitsandbytes", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "versions": versions,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "threads": config.engine.threads,
        "seed": config.seed,
        "changed_keys": list(config.changed()),
        "commit": _commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _commit() -> str | None:
    """The commit of the running source tree; None outside a checkout."""
    here = Path(__file__).resolve().parents[1]
    git = shutil.which("git")
    if git is None or not (here.parent / ".git").exists():
        return None
    command = [git, "-C", str(here), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    return done.stdout.strip() or None


def _is_count(text: str) -> bool:
    return text.isdecimal() and len(text) < 10
