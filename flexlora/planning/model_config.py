"""The ``config.json`` behind a model's name: a folder, a file, ``embedded`` or a hub name."""

from __future__ import annotations

import json
from pathlib import Path

from flexlora.config.paths import expanded, resolve_name
from flexlora.errors import UserError
from flexlora.planning.architectures import shape_from_config
from flexlora.planning.shapes import ModelShape

__all__ = ["read_shape"]


def read_shape(name: str) -> ModelShape:
    """The shape of a model folder, of ``embedded``, or of a hub model.

    Raises:
        UserError: the file is missing or not JSON, or the architecture is unknown.
    """
    file = _config_file(name)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"'{file}' cannot be read as JSON: {error}.") from None
    if not isinstance(config, dict):
        raise UserError(f"'{file}' holds {type(config).__name__}, expected an object of keys.")
    return shape_from_config(config)


def _config_file(name: str) -> Path:
    file = Path(expanded(name))
    if file.suffix == ".json" and file.is_file():
        return file
    source = resolve_name(name)
    return Path(source) / "config.json" if Path(source).is_dir() else _from_hub(source)


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # no line per retry: the last error is reported below
    try:
        return Path(hf_hub_download(name, "config.json"))
    except Exception as error:  # the hub client raises many types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"config.json of '{name}' cannot be fetched: {reason}") from None
    finally:
        logging.set_verbosity(verbosity)
