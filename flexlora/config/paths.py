"""The folder of the embedded model, and the folder or hub name behind ``model.name``."""

from __future__ import annotations

from pathlib import Path

from flexlora.errors import UserError

__all__ = ["EMBEDDED", "resolve_name"]

EMBEDDED = Path(__file__).parents[1] / "assets" / "base"


def resolve_name(name: str) -> str:
    """The folder or hub name behind ``model.name``.

    Raises:
        UserError: a path that does not exist, or a folder without a ``config.json``.
    """
    if name == "embedded":
        return str(EMBEDDED)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"model folder '{name}' has no config.json; is it a model folder?")
        return str(path.resolve())
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or path.exists():
        raise UserError(
            f"the model is '{name}', which is not a folder; "
            "expected 'embedded', a model folder or a hub name like 'owner/model'."
        )
    return name
