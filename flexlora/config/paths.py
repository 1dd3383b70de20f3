"""The folder of the embedded model, and the folder or hub name behind ``model.name``."""

from __future__ import annotations

import json
from pathlib import Path

from flexlora.errors import UserError

__all__ = ["EMBEDDED", "resolve_name"]

EMBEDDED = Path(__file__).parents[1] / "assets" / "base"
ADAPTER = "adapter_config.json"


def resolve_name(name: str) -> str:
    """The folder or hub name behind ``model.name``.

    Raises:
        UserError: a path that does not exist or is a file, a folder without a ``config.json``.
    """
    if name == "embedded":
        return str(EMBEDDED)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"model folder '{name}' {_without_config(path)}")
        return str(path.resolve())
    if path.suffix == ".gguf":
        raise UserError(f"the model is '{name}', a GGUF file; {_NO_GGUF}")
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or path.exists():
        raise UserError(
            f"the model is '{name}', which is not a folder; "
            "expected 'embedded', a model folder or a hub name like 'owner/model'."
        )
    return name


_NO_GGUF = (
    "expected a folder with config.json and the weights as safetensors, which the publisher "
    "of the GGUF file usually names."
)


def _without_config(path: Path) -> str:
    """What a folder without a ``config.json`` holds instead, and what to give."""
    files = sorted(file.name for file in path.iterdir())
    if not files:
        return "is empty, so it has no config.json; was it copied?"
    if ADAPTER in files:
        return f"has no config.json but an adapter ({ADAPTER}); give the folder {_base_of(path)}."
    if any(file.endswith(".gguf") for file in files):
        return f"has no config.json but a GGUF file; {_NO_GGUF}"
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
