"""Checkpoints of the server's state; a crash at any byte leaves a valid one.

Each round is one new file, complete and synced before ``current.json`` is replaced by an atomic
rename. ``current.json`` names the round and the digests; older files are removed afterwards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from flexlora.aggregation.engine.state import GlobalChange, State
from flexlora.algebra.linalg import FactoredSVD
from flexlora.errors import UserError
from flexlora.lora.ranks import RankClass
from flexlora.wire.files import write_atomically

__all__ = ["load_checkpoint", "load_notes", "save_checkpoint"]

FORMAT = 1  # of current.json; what named none (0) is the same without the notes' "sources"


def save_checkpoint(
    folder: Path,
    state: State,
    rank_classes: Mapping[str, RankClass],
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write ``state`` and the rank classes, then delete the previous checkpoint.

    ``notes`` is further state that a resume needs, as JSON values.
    """
    tensors = {f"extra/{key}": tensor.contiguous() for key, tensor in state.extra.items()}
    for name, svd in state.change.items():
        for label in ("U", "S", "Vh"):
            tensors[f"change/{name}/{label}"] = getattr(svd, label).contiguous()
    data = save(tensors)
    file = f"round-{state.round:06d}.safetensors"
    write_atomically(folder / file, data)
    index = {
        "format": FORMAT,
        "file": file,
        "sha256": hashlib.sha256(data).hexdigest(),
        "round": state.round,
        "dropped_energy": state.dropped_energy,
        "modules": list(state.change),
        "rank_classes": {k: rank_class.to_dict() for k, rank_class in rank_classes.items()},
        "notes": dict(notes or {}),
    }
    text = json.dumps(index, indent=1, sort_keys=True) + "\n"
    write_atomically(folder / "current.json", text.encode())
    for old in folder.glob("round-*.safetensors*"):
        if old.name != file:
            old.unlink()


def load_checkpoint(folder: Path) -> tuple[State, dict[str, RankClass]]:
    """The last whole state and the rank class of each client.

    Raises:
        UserError: there is none, a newer FlexLoRA has written it, or its digest is wrong.
    """
    index_file = folder / "current.json"
    if not index_file.is_file():
        raise UserError(f"'{folder}' holds no checkpoint; no round of this run was finished.")
    try:
        index = json.loads(index_file.read_text(encoding="utf-8"))
        _check_format(folder, index.get("format", 0))
        path = folder / index["file"]
        data = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(data).hexdigest() != index["sha256"]:
            raise ValueError(path)
        return _decode(index, load(data))
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"the checkpoint in '{folder}' is damaged: it does not hold the bytes once written."
        ) from None


def _check_format(folder: Path, found: Any) -> None:
    if type(found) is not int or found < 0:
        raise ValueError(found)
    if found > FORMAT:
        raise UserError(
            f"the checkpoint in '{folder}' has format {found}, and this FlexLoRA reads up to "
            f"{FORMAT}; use the FlexLoRA that wrote it (environment.json says which), or a newer."
        )


def load_notes(folder: Path) -> dict[str, Any]:
    """The notes of the last checkpoint; ``load_checkpoint`` verifies it.

    Raises:
        UserError: they are damaged.
    """
    try:
        index = json.loads((folder / "current.json").read_text(encoding="utf-8"))
        return dict(index.get("notes", {}))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"the checkpoint in '{folder}' is damaged: its notes are unreadable."
        ) from None


def _decode(
    index: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> tuple[State, dict[str, RankClass]]:
    # Clone: alignment in memory decides which kernel runs, and so the last bit.
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    modules = {
        name: FactoredSVD(**{k: tensors[f"change/{name}/{k}"] for k in ("U", "S", "Vh")})
        for name in index["modules"]
    }
    extra = {
        key.removeprefix("extra/"): tensor
        for key, tensor in tensors.items()
        if key.startswith("extra/")
    }
    state = State(
        round=index["round"],
        change=GlobalChange(modules),
        dropped_energy=index["dropped_energy"],
        extra=extra,
    )
    classes = {k: RankClass.from_dict(values) for k, values in index["rank_classes"].items()}
    return state, classes
