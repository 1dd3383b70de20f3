"""Write a new folder all at once, or nothing; never overwrite.

Files go into a hidden folder beside the wanted one, are synced, and the folder is renamed: the
system renames onto an empty folder and onto nothing else. A crash before that leaves the hidden
folder, which nothing refers to.
"""

from __future__ import annotations

import os
import shutil
import string
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from flexlora.errors import UserError
from flexlora.wire.files import sync_folder

__all__ = ["SECRET", "File", "check_free", "fill_tree", "write_folder"]

SECRET, PUBLIC, SCRIPT = 0o600, 0o644, 0o755


@dataclass(frozen=True, kw_only=True)
class File:
    """A file by its path below the folder; the folder of a secret gets mode 0700."""

    path: str
    content: bytes
    mode: int = PUBLIC


def check_free(folder: str | Path) -> Path:
    """The absolute path of a folder that is empty or not there.

    Raises:
        UserError: it is a file, or holds something.
    """
    path = Path(folder).resolve()
    if path.exists() and not path.is_dir():
        raise UserError(f"'{folder}' is a file, expected a folder to make; give another name.")
    if path.is_dir() and any(path.iterdir()):
        raise UserError(
            f"'{folder}' is not empty, and init overwrites nothing; give a new folder, or move "
            "this one away."
        )
    return path


def fill_tree(
    templates: Path, values: Mapping[str, str], *, wanted: Callable[[str], bool] = lambda path: True
) -> list[File]:
    """Every template by its relative path, with ``$name`` and ``${name}`` filled in.

    Files in ``bin`` are executable.

    Raises:
        KeyError: a template names a value that is not given.
    """
    files = []
    for source in sorted(path for path in templates.rglob("*") if path.is_file()):
        path = source.relative_to(templates).as_posix()
        if not wanted(path):
            continue
        text = string.Template(source.read_text(encoding="utf-8")).substitute(values)
        mode = SCRIPT if path.startswith("bin/") else PUBLIC
        files.append(File(path=path, content=text.encode(), mode=mode))
    return files


def write_folder(folder: Path, files: Iterable[File], *, empty: Mapping[str, int]) -> None:
    """Write ``files`` and the ``empty`` folders (with their modes), all or nothing.

    Raises:
        UserError: what ``check_free`` refuses, or a place that cannot be written to.
    """
    check_free(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{folder.name}.unfinished-"
        made = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))  # its owner's alone
    except OSError as error:
        raise _cannot(folder, error) from None
    try:
        for name, mode in empty.items():
            _make_folder(made, made / name, mode)
        for file in files:
            _write(made, file)
        made.chmod(0o755)
        os.rename(made, folder)
        sync_folder(folder.parent)
    except OSError as error:
        shutil.rmtree(made, ignore_errors=True)
        raise _cannot(folder, error) from None
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def _write(made: Path, file: File) -> None:
    path = made / file.path
    _make_folder(made, path.parent, 0o700 if file.mode == SECRET else 0o755)
    # Created for its owner alone, whatever the umask; opened to others once it is complete.
    number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, SECRET)
    with os.fdopen(number, "wb") as out:
        out.write(file.content)
        os.fchmod(number, file.mode)
        out.flush()
        os.fsync(number)


def _make_folder(made: Path, path: Path, mode: int) -> None:
    """``path`` and what is missing above it; the strictest mode asked for stays."""
    if path == made:
        return
    if not path.exists():
        _make_folder(made, path.parent, 0o755)
        path.mkdir()
        path.chmod(mode)
    path.chmod(path.stat().st_mode & mode)


def _cannot(folder: Path, error: OSError) -> UserError:
    reason = error.strerror or error
    return UserError(f"'{folder}' cannot be written: {reason}; give a folder in another place.")
