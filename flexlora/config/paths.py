"""Paths and text files that a person names: the home folder behind ``~``, marks of an editor.

A configuration key that takes a path is a ``sections.PathKey``, an option of a command has the
type ``commands.options.PATH``: both replace ``~`` where the value is read, with ``expanded``.
Relative paths are those of the folder that the command was started in, also in a TOML file.
"""

from __future__ import annotations

import codecs
import json
import os
from pathlib import Path

from flexlora.errors import UserError

__all__ = ["EMBEDDED", "expanded", "read_text", "resolve_name"]

EMBEDDED = Path(__file__).parents[1] / "assets" / "base"
ADAPTER = "adapter_config.json"
MARKS = {  # longest first: UTF-16's begins UTF-32's
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def expanded(path: str) -> str:
    """``path`` with ``~`` or ``~user`` at its beginning replaced by that home folder.

    Raises:
        UserError: no such user on this machine.
    """
    full = os.path.expanduser(path)
    if full.startswith("~"):
        name = full.partition("/")[0]
        raise UserError(
            f"'{path}' begins with '{name}', and this machine knows no such user's home folder; "
            f"write the whole path, or './{full}' for a name that begins with ~."
        )
    return full


def read_text(path: str | Path, what: str) -> str:
    """A file that a person has written, as text; ``what`` names it in errors.

    The byte-order mark that some editors write before UTF-8 is dropped; lines end in ``\\n``.

    Raises:
        UserError: the file is missing, cannot be read, or is not UTF-8.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{what} '{path}' does not exist.") from None
    except OSError as error:
        raise UserError(f"{what} '{path}' cannot be read: {error.strerror}.") from None
    kind = next((name for mark, name in MARKS.items() if data.startswith(mark)), "")
    if not kind and b"\0" in data:
        kind = "not text, or UTF-16"
    try:
        text = "" if kind else data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        kind = f"not UTF-8 in line {line} (byte {data[error.start]:#04x})"
    if kind:
        raise UserError(
            f"{what} '{path}' cannot be read: it is {kind}, expected UTF-8; save it again with "
            "that encoding."
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def resolve_name(name: str) -> str:
    """The folder or hub name behind ``model.name``; of a GGUF file the one that it is unpacked to.

    Raises:
        UserError: a path that does not exist or is another file, a folder without a
            ``config.json``, a GGUF file that cannot be unpacked.
    """
    if name == "embedded":
        return str(EMBEDDED)
    path = Path(expanded(name))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"model folder '{name}' {_without_config(path)}")
        return str(path.resolve())
    if path.suffix == ".gguf":
        from flexlora.config.gguf_base import unpacked

        return str(unpacked(path, name))
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or path.exists():
        raise UserError(
            f"the model is '{name}', which is not a folder; "
            "expected 'embedded', a model folder or a hub name like 'owner/model'."
        )
    return name


def _without_config(path: Path) -> str:
    """What a folder without a ``config.json`` holds instead, and what to give."""
    files = sorted(file.name for file in path.iterdir())
    if not files:
        return "is empty, so it has no config.json; was it copied?"
    if ADAPTER in files:
        return f"has no config.json but an adapter ({ADAPTER}); give the folder {_base_of(path)}."
    if found := [file for file in files if file.endswith(".gguf")]:
        return f"has no config.json but a GGUF file; give '{path / found[0]}'."
    below = [file for file in files if (path / file / "config.json").is_file()]
    if below:
        return f"has no config.json, but its folder '{below[-1]}' has one; give that."
    return "has no config.json; is it a model folder?"


def _base_of(path: Path) -> str:
    """The base that a PEFT folder names, in words."""
    try:
        base = json.loads((path / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, TypeError, KeyError):
        base = None
    return f"or hub name of its base, '{base}'" if isinstance(base, str) else "of its base"
