"""The weights of a base that is a GGUF file, dequantized once into its unpacked folder."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from flexlora.config.gguf_base import ORIGIN, read_quietly
from flexlora.errors import UserError

__all__ = ["write_missing_weights"]


def write_missing_weights(folder: Path, name: str) -> None:
    """Dequantize the file behind ``folder`` into float32 safetensors, if that is not done yet.

    Does nothing for a folder that is not of a GGUF file.

    Raises:
        UserError: the file is not there any more or cannot be read, the disk is full.
    """
    origin = folder / ORIGIN
    if not origin.is_file() or list(folder.glob("model.safetensors*")):
        return
    file = Path(json.loads(origin.read_text(encoding="utf-8"))["file"])
    model = read_quietly(lambda: _dequantized(file), f"model '{name}' cannot be loaded")
    _write(model, folder)


def _dequantized(file: Path) -> Any:
    """A float model that ``save_pretrained`` writes as one that was never quantized."""
    from transformers import AutoModelForCausalLM, GgufConfig

    return AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )


def _write(model: Any, folder: Path) -> None:
    part = Path(tempfile.mkdtemp(dir=folder))
    try:
        model.save_pretrained(part)
        written = part.glob("*.safetensors*")
        # the name that open_checkpoint looks for comes last
        for stored in sorted(written, key=lambda path: "-of-" not in path.name):
            os.replace(stored, folder / stored.name)
    except OSError as error:
        raise UserError(f"'{folder}' cannot be written: {error.strerror}.") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
