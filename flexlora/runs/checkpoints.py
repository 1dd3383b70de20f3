"""Checkpoints of the server's state; a crash at any byte leaves a valid one.

Each round is one new file, complete and synced before ``current.json`` is replaced by an atomic
rename. ``current.json`` names the round and the digests. The last ``keep`` rounds stay, each with
an index of its own (``round-000003.json``, the bytes that ``current.json`` had), so that a run can
go back to one of them; older files are removed afterwards. On disk lie at most ``keep`` states, and
one more while the next is written.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from flexlora.aggregation.engine.state import GlobalChange, State
from flexlora.algebra.linalg import FactoredSVD
from flexlora.errors import UserError
from flexlora.lora.ranks import RankClass
from flexlora.wire.files import write_atomically

__all__ = [
    "checkpoint_digest",
    "go_back",
    "kept_rounds",
    "load_checkpoint",
    "load_notes",
    "remove_later",
    "save_checkpoint",
]

FORMAT = 1  # of current.json; what named none (0) is the same without the notes' "sources"
CURRENT = "current.json"
_FILE = re.compile(r"round-(\d+)\.(?:safetensors|json)(?:\.partial)?")
# What an index of other bytes than were written can end in.
DAMAGE = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
    OSError,
)


def save_checkpoint(
    folder: Path,
    state: State,
    rank_classes: Mapping[str, RankClass],
    notes: Mapping[str, Any] | None = None,
    *,
    keep: int = 1,
    before_commit: Callable[[str], None] | None = None,
) -> None:
    """Write ``state`` and the rank classes, then delete all but the last ``keep`` checkpoints.

    ``notes`` is further state that a resume needs, as JSON values. ``before_commit`` is called with
    the digest of the state's file once that is on disk, before the checkpoint becomes the current.
    """
    data = save(_tensors(state))
    file, digest = f"{_stem(state.round)}.safetensors", hashlib.sha256(data).hexdigest()
    write_atomically(folder / file, data)
    index = {
        "format": FORMAT,
        "file": file,
        "sha256": digest,
        "round": state.round,
        "dropped_energy": state.dropped_energy,
        "modules": list(state.change),
        "rank_classes": {k: rank_class.to_dict() for k, rank_class in rank_classes.items()},
        "notes": dict(notes or {}),
    }
    text = (json.dumps(index, indent=1, sort_keys=True) + "\n").encode()
    if before_commit is not None:
        before_commit(digest)
    if keep > 1:
        write_atomically(folder / _index_file(state.round), text)
    write_atomically(folder / CURRENT, text)
    written = _files(folder)
    kept = sorted(at for at in set(written.values()) if at <= state.round)[-keep:]
    _remove(path for path, at in written.items() if at not in kept)


def _tensors(state: State) -> dict[str, torch.Tensor]:
    tensors = {f"extra/{key}": tensor.contiguous() for key, tensor in state.extra.items()}
    for name, svd in state.change.items():
        for label in ("U", "S", "Vh"):
            tensors[f"change/{name}/{label}"] = getattr(svd, label).contiguous()
    return tensors


def _stem(server_round: int) -> str:
    return f"round-{server_round:06d}"


def _index_file(server_round: int | None) -> str:
    return CURRENT if server_round is None else f"{_stem(server_round)}.json"


def _files(folder: Path) -> dict[Path, int]:
    """Every file of a round, half-written ones too, with its round."""
    found = ((path, _FILE.fullmatch(path.name)) for path in folder.glob("round-*"))
    return {path: int(match[1]) for path, match in found if match}


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def kept_rounds(folder: Path) -> list[int]:
    """The rounds to which ``go_back`` can go, ascending; the last is the current one.

    Raises:
        UserError: there is no checkpoint, or its index is damaged.
    """
    current = int(_read_index(folder, None)["round"])
    earlier = {
        at
        for path, at in _files(folder).items()
        if at < current and (folder / _index_file(at)).is_file() and path.suffix == ".safetensors"
    }
    return [*sorted(earlier), current]


def go_back(folder: Path, server_round: int) -> None:
    """Make the checkpoint of a kept round the current one.

    Raises:
        UserError: it is damaged; the current one is as before.
    """
    if server_round != _read_index(folder, None)["round"]:
        load_checkpoint(folder, server_round)
        write_atomically(folder / CURRENT, (folder / _index_file(server_round)).read_bytes())


def remove_later(folder: Path) -> None:
    """Delete the checkpoints of rounds after the current one, which ``go_back`` leaves."""
    current = int(_read_index(folder, None)["round"])
    _remove(path for path, at in _files(folder).items() if at > current)


def checkpoint_digest(folder: Path, server_round: int | None = None) -> tuple[int, str]:
    """The round and the SHA-256 that the index of a checkpoint (default: the current) names.

    Raises:
        UserError: there is none, or its index is damaged.
    """
    index = _read_index(folder, server_round)
    return int(index["round"]), str(index["sha256"])


def load_checkpoint(
    folder: Path, server_round: int | None = None
) -> tuple[State, dict[str, RankClass]]:
    """The last whole state, or that of a kept round, and the rank class of each client.

    Raises:
        UserError: there is none, a newer FlexLoRA has written it, or its digest is wrong.
    """
    index = _read_index(folder, server_round)
    try:
        path = folder / index["file"]
        data = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(data).hexdigest() != index["sha256"]:
            raise ValueError(path)
        return _decode(index, load(data))
    except DAMAGE:
        raise _damaged(folder) from None


def _read_index(folder: Path, server_round: int | None) -> dict[str, Any]:
    """An index with its round, file and digest.

    Raises:
        UserError: there is none, a newer FlexLoRA has written it, or it is damaged.
    """
    index_file = folder / _index_file(server_round)
    if not index_file.is_file():
        raise UserError(f"'{folder}' holds no checkpoint; no round of this run was finished.")
    try:
        index = json.loads(index_file.read_text(encoding="utf-8"))
        _check_format(folder, index.get("format", 0))
        if type(index["round"]) is not int or not (index["file"] and index["sha256"]):
            raise ValueError(index_file)
        return index
    except UserError:
        raise
    except DAMAGE:
        raise _damaged(folder) from None


def _check_format(folder: Path, found: Any) -> None:
    if type(found) is not int or found < 0:
        raise ValueError(found)
    if found > FORMAT:
        raise UserError(
            f"the checkpoint in '{folder}' has format {found}, and this FlexLoRA reads up to "
            f"{FORMAT}; use the FlexLoRA that wrote it (environment.json says which), or a newer."
        )


def load_notes(folder: Path, server_round: int | None = None) -> dict[str, Any]:
    """The notes of the last checkpoint, or of a kept one; ``load_checkpoint`` verifies it.

    Raises:
        UserError: they are damaged.
    """
    try:
        text = (folder / _index_file(server_round)).read_text(encoding="utf-8")
        return dict(json.loads(text).get("notes", {}))
    except DAMAGE:
        raise _damaged(folder) from None


def _damaged(folder: Path) -> UserError:
    return UserError(
        f"the checkpoint in '{folder}' is damaged: it does not hold the bytes once written."
    )


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
