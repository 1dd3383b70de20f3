"""Model folders as people have them with one thing changed: the embedded base, or tiny ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from builders import tiny_model
from flexlora.config.paths import EMBEDDED


def copied(folder: Path) -> Path:
    """A copy of the embedded base, a tied Llama of four layers, without its README."""
    return Path(shutil.copytree(EMBEDDED, folder, ignore=shutil.ignore_patterns("*.md")))


def saved(folder: Path, model) -> Path:
    """A model's folder with the embedded tokenizer beside it."""
    model.save_pretrained(folder)
    for file in EMBEDDED.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def tiny(folder: Path, kind: str = "llama", **changes) -> Path:
    return saved(folder, tiny_model(kind, **changes))


def configured(folder: Path, **changes) -> Path:
    """The folder with keys of its ``config.json`` set; None takes a key out."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


def with_tensors(folder: Path, change) -> Path:
    """The folder with ``change`` applied to its tensors by name; it may return others."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors = change(tensors) or tensors
    save_file({k: v.contiguous() for k, v in tensors.items()}, file, metadata={"format": "pt"})
    return folder


def sharded(folder: Path, count: int = 2) -> Path:
    """The folder with its tensors in ``count`` files and an index, as large models come."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    placed = {n: f"model-{i % count + 1:05}-of-{count:05}.safetensors" for i, n in enumerate(names)}
    for shard in sorted(set(placed.values())):
        held = {name: tensors[name] for name in names if placed[name] == shard}
        save_file(held, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
