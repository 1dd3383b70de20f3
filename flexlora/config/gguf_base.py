"""A base that is a GGUF file: unpacked once into a folder as transformers writes it.

Everything that reads a base then reads that folder, so that a GGUF base is trained, planned,
quantized and fingerprinted as any other. The folder is in the user's cache, named after the file
and its path, size and time of change; ``config.json`` and the tokenizer come first, the weights
(float32, so 4 bytes a parameter) when they are needed (``training/gguf_weights.py``).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from flexlora.config.gguf_package import gguf_package
from flexlora.config.gguf_splits import split_of
from flexlora.config.paths import expanded
from flexlora.errors import UserError, reason

__all__ = ["ORIGIN", "is_gguf", "read_quietly", "unpacked"]

ORIGIN = "gguf.json"  # in an unpacked folder: the file that it came from
MAGIC = b"GGUF"
FIELDS = (
    *("general.architecture", "general.type", "split.count"),
    *("tokenizer.ggml.model", "tokenizer.ggml.pre"),
)


def is_gguf(path: Path) -> bool:
    """By its name; the content is checked when it is read."""
    return path.suffix == ".gguf"


def unpacked(path: Path, name: str) -> Path:
    """The folder of a GGUF file, with ``config.json`` and the tokenizer.

    Raises:
        UserError: no such file, not a GGUF file, an adapter or a part of a model, an architecture
            or a tokenizer that is not read right, or ``gguf`` is not installed.
    """
    _check_content(path, name)
    gguf_package()
    folder = _cache() / f"{path.stem}-{_key(path)}"
    if not (folder / "config.json").is_file():
        _unpack(path.resolve(), name, folder)
    return folder


def _check_content(path: Path, name: str) -> None:
    if not path.is_file():
        raise UserError(f"the model is '{name}', a GGUF file that does not exist.")
    try:
        with path.open("rb") as file:
            start = file.read(len(MAGIC))
    except OSError as error:
        raise UserError(f"model '{name}' cannot be read: {error.strerror}.") from None
    if start != MAGIC:
        raise UserError(
            f"model '{name}' is not a GGUF file: it begins with {start!r}, expected {MAGIC!r}; "
            "copy it again."
        )


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(expanded(home)) / "flexlora" / "gguf"


def _key(path: Path) -> str:
    full, state = path.resolve(), path.stat()
    text = f"{full}|{state.st_size}|{state.st_mtime_ns}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _unpack(path: Path, name: str, folder: Path) -> None:
    """Write to a folder beside, then rename: another process may do the same."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=folder.parent))
    except OSError as error:
        raise UserError(f"'{folder}' cannot be made: {error.strerror}.") from None
    try:
        fields = _checked_fields(path, name)
        _write_config(path, name, fields, part)
        _write_tokenizer(path, name, fields, part)
        (part / ORIGIN).write_text(json.dumps({"file": str(path)}) + "\n", encoding="utf-8")
        if not folder.exists():
            os.rename(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _checked_fields(path: Path, name: str) -> dict[str, Any]:
    """The metadata that is looked at here, and whether there are factors of the frequencies."""
    try:
        reader = gguf_package().GGUFReader(path)
        fields = {key: reader.fields[key].contents() for key in FIELDS if key in reader.fields}
        scaling = f"{fields.get('general.architecture')}.rope.scaling.type"
        scaled = reader.fields[scaling].contents() if scaling in reader.fields else "none"
        names = {tensor.name for tensor in reader.tensors}
    except Exception as error:  # a damaged file may raise any error
        raise UserError(f"model '{name}' is damaged or cut short: {reason(error)}") from None
    if fields.get("general.type", "model") != "model":
        raise UserError(
            f"model '{name}' is a GGUF file of type '{fields['general.type']}', expected a model."
        )
    if fields.get("split.count", 0) > 1:
        raise UserError(
            f"model '{name}' is one of {fields['split.count']} parts; join them with llama.cpp's "
            "`llama-gguf-split --merge` and give the whole file."
        )
    fields["scaled"] = scaled != "none" or "rope_freqs.weight" in names
    return fields


def _write_config(path: Path, name: str, fields: dict[str, Any], folder: Path) -> None:
    from transformers import AutoConfig

    config = read_quietly(
        lambda: AutoConfig.from_pretrained(path.parent, gguf_file=path.name),
        f"model '{name}' is a GGUF file of the architecture "
        f"'{fields.get('general.architecture')}', which transformers does not load",
    )
    rope = getattr(config, "rope_parameters", None) or {}
    if fields["scaled"] and rope.get("rope_type", "default") == "default":
        raise UserError(
            f"model '{name}' scales its rotary frequencies, which transformers leaves out when it "
            "reads a GGUF file; give the folder of the model that it was made from."
        )
    config.save_pretrained(folder)
    file = folder / "config.json"
    stored = _shortest(json.loads(file.read_text(encoding="utf-8")))
    file.write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _shortest(value: Any) -> Any:
    """Float32 numbers as the shortest decimal: 1e-05 instead of 9.999999747378752e-06."""
    import numpy as np

    if isinstance(value, dict):
        return {key: _shortest(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_shortest(item) for item in value]
    if isinstance(value, float) and float(np.float32(value)) == value:
        return float(str(np.float32(value)))
    return value


def _write_tokenizer(path: Path, name: str, fields: dict[str, Any], folder: Path) -> None:
    """transformers knows some pre-tokenizers only; the others are set, or refused."""
    from transformers import AutoTokenizer

    tokenizer = read_quietly(
        lambda: AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name),
        f"the tokenizer of model '{name}' ('{fields.get('tokenizer.ggml.model')}') is not read by "
        "transformers",
    )
    if fields.get("tokenizer.ggml.model") == "gpt2":
        pre = fields.get("tokenizer.ggml.pre", "")
        if (split := split_of(pre)) is None:
            raise UserError(
                f"the tokenizer of model '{name}' splits words as '{pre}', which FlexLoRA does "
                "not know; give the folder of the model that it was made from."
            )
        tokenizer.backend_tokenizer.pre_tokenizer = split
    tokenizer.save_pretrained(folder)


def read_quietly(read: Callable[[], Any], cause: str) -> Any:
    """What ``read`` returns, without transformers' lines and bars.

    Raises:
        UserError: ``cause`` and the library's reason.
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(50)
    try:
        with redirect_stderr(io.StringIO()):  # a bar that no setting turns off
            return read()
    except Exception as error:  # the families raise different errors
        raise UserError(f"{cause}: {reason(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
