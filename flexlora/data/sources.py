"""Sources of rows: a folder of JSONL, a data set on the hub, or the built-in tasks.

Each source returns ``{split: rows}`` for the splits it has, always with ``train``. Rows keep the
order of their file.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

from flexlora.data.rows import Row, parse_row
from flexlora.errors import UserError

__all__ = ["SPLITS", "load_embedded", "load_folder", "load_hub"]

SPLITS = ("train", "validation", "test")


def load_folder(path: str | Path) -> dict[str, list[Row]]:
    """The rows of ``{train,validation,test}.jsonl`` or ``.jsonl.gz`` in a folder.

    Byte-order marks, blank lines and CRLF line ends are tolerated.

    Raises:
        UserError: no such folder, no train file, a split in both forms, a file that cannot be
            read, a line that is not a row (with file and line), or a train file without rows.
    """
    folder = Path(path)
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise UserError(
            f"data.path '{path}' {problem}, expected a folder that holds train.jsonl or "
            "train.jsonl.gz; name that folder."
        )
    files = {split: file for split in SPLITS if (file := _split_file(folder, split))}
    if "train" not in files:
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise UserError(
            f"data.path '{path}' holds {found}, expected train.jsonl or train.jsonl.gz (and "
            "validation and test likewise); rename the files or name another folder."
        )
    rows = {split: list(_read(file)) for split, file in files.items()}
    if not rows["train"]:
        raise UserError(
            f"{files['train']} holds no rows, expected at least one; add training rows."
        )
    return rows


def load_hub(name: str) -> dict[str, list[Row]]:
    """The rows of a hub data set's train, validation and test splits (opens a connection).

    Raises:
        UserError: the ``datasets`` package is absent, the data set cannot be loaded or has no
            train split, or a row is not of our shape.
    """
    # A data set's own script is refused; datasets 3 would ask at the terminal whether to run it.
    os.environ["HF_DATASETS_TRUST_REMOTE_CODE"] = "0"
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"data.name '{name}' is a data set on the hub, which needs the 'datasets' package, "
            "and it is not installed; run 'pip install datasets' or use data.path with a folder "
            "of JSONL."
        ) from None
    try:
        loaded = datasets.load_dataset(name)
    except (OSError, ValueError) as error:
        raise UserError(
            f"data.name '{name}' cannot be loaded from the hub "
            f"({type(error).__name__}: {_first_line(error)}); "
            "check the name and the connection, or use data.path with a folder of JSONL."
        ) from error
    if "train" not in loaded:
        raise UserError(
            f"data.name '{name}' has the splits {', '.join(loaded)}, expected 'train' among "
            "them; save the rows as train.jsonl and use data.path."
        )
    return {
        split: [parse_row(row, f"{name} {split} row {n}") for n, row in enumerate(loaded[split], 1)]
        for split in SPLITS
        if split in loaded
    }


def load_embedded(num_clients: int, seed: int, tasks: str = "default") -> dict[str, list[Row]]:
    """The built-in tasks for ``num_clients`` clients; every row names its client and its task.

    Raises:
        UserError: fewer than one client, or an unknown family among ``tasks``.
    """
    if num_clients < 1:
        raise UserError(
            f"clients.count is {num_clients}, expected at least 1 for the built-in tasks, which "
            "are made for as many clients as asked."
        )
    from flexlora.data.tasks import embedded_rows

    return embedded_rows(num_clients, seed, tasks)


def _split_file(folder: Path, split: str) -> Path | None:
    """The one file of a split, or None."""
    found = [file for end in ("jsonl", "jsonl.gz") if (file := folder / f"{split}.{end}").is_file()]
    if len(found) == 2:
        raise UserError(
            f"data.path '{folder}' holds both {found[0].name} and {found[1].name}, expected one "
            f"file per split; take one of them away."
        )
    return found[0] if found else None


def _read(file: Path) -> Iterator[Row]:
    """The rows of one file, each error with the file and the line."""
    opener = gzip.open if file.suffix == ".gz" else open
    try:
        # Bytes, because text mode would also split lines at U+2028 and the like inside strings.
        with opener(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                where = f"{file} line {number}"
                text = _decoded(line, where)
                if text:
                    yield parse_row(_json(text, where), where)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{file} cannot be read ({_first_line(error)}), expected a complete"
            f"{' gzip' if file.suffix == '.gz' else ''} file; copy it again or check its rights."
        ) from error


def _decoded(line: bytes, where: str) -> str:
    try:
        # Any line may have a byte-order mark: files may have been concatenated.
        text = line.decode().lstrip("\ufeff").strip()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: byte {error.start + 1} is not UTF-8, expected UTF-8 text; save the file "
            "with that encoding."
        ) from None
    if "\0" in text:
        raise UserError(
            f"{where}: found null bytes, as in UTF-16, expected UTF-8 text; save the file with "
            "that encoding."
        )
    return text


def _json(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where}: not JSON ({_first_line(error)}), expected one JSON object on each line; "
            "remedy the line or take it out."
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
