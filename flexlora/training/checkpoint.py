"""The safetensors files of a base: all there, whole, and loaded as they are.

transformers draws a tensor at random that it does not find, and only logs it. Here a base has every
tensor of its architecture, in its shape, or it is refused by the names of the tensors.

A tensor that the architecture has no place for is refused too, since the model then is another
one (more layers, biases, an adapter that was never merged), with two exceptions, which are logged:
value heads of reinforcement learning, and the vision or audio parts of a checkpoint whose language
model alone is loaded. Buffers that transformers computes (``COMPUTED``) do not count.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from flexlora.config.base_config import read_config
from flexlora.errors import UserError

__all__ = ["COMPUTED", "Checkpoint", "check_loaded", "listed", "open_checkpoint"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
NOT_FOR_TEXT = re.compile(
    r"(^|\.)(v_head|value_head|vision\w*|visual|audio\w*|multi_modal\w*|\w*projector|mm_\w*)\."
)
# Buffers that transformers computes: older copies of a base store them, newer ones do not.
COMPUTED = re.compile(
    r"(rotary_emb\.inv_freq|position_ids|\.masked_bias|\.(attn|attention)\.bias)$"
)
# What a safetensors header calls the numbers that are weights as they stand.
FLOATS = frozenset(["F64", "F32", "F16", "BF16"])
SHOWN = 3


@dataclass(frozen=True)
class Checkpoint:
    """The name of every stored tensor, and the file that holds it."""

    name: str
    files: Mapping[str, Path]

    def without(self, tensors: Iterable[str]) -> Checkpoint:
        """Without the tensors that were not loaded."""
        left_out = set(tensors)
        kept = {tensor: file for tensor, file in self.files.items() if tensor not in left_out}
        return Checkpoint(self.name, kept)

    def by_file(self) -> dict[Path, list[str]]:
        """The names of each file's tensors, sorted."""
        found: dict[Path, list[str]] = {}
        for tensor, file in sorted(self.files.items()):
            found.setdefault(file, []).append(tensor)
        return found


def open_checkpoint(folder: Path, name: str) -> Checkpoint:
    """Read the headers of a model folder's safetensors files; ``name`` is for errors.

    Raises:
        UserError: no such files (a pickle is never read), an index that names absent files or
            tensors, a file that is cut short, weights in integers or 8-bit floats.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file():
        return Checkpoint(name, dict.fromkeys(_tensors_in(single, name), single))
    if not index.is_file():
        raise UserError(f"model folder '{name}' {_without_weights(folder)}")
    placed = read_config(index).get("weight_map")
    if not isinstance(placed, Mapping) or not all(isinstance(x, str) for x in placed.values()):
        raise UserError(f"'{index}' has no weight_map of tensors to files; copy the file again.")
    shards = sorted(set(placed.values()))
    if absent := [shard for shard in shards if not (folder / shard).is_file()]:
        raise UserError(
            f"model folder '{name}' lacks {listed(absent)} of the {len(shards)} files that {INDEX} "
            "names; finish copying it."
        )
    held = {shard: set(_tensors_in(folder / shard, name)) for shard in shards}
    if lost := [tensor for tensor, shard in placed.items() if tensor not in held[shard]]:
        raise UserError(
            f"model folder '{name}': {INDEX} names {listed(lost)}, which the file "
            f"'{placed[min(lost)]}' does not hold; copy the index and the files together."
        )
    found = {tensor: folder / shard for shard in shards for tensor in held[shard]}
    return Checkpoint(name, found)


def _tensors_in(file: Path, name: str) -> list[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
            kinds = {
                key: opened.get_slice(key).get_dtype() for key in names if key.endswith(".weight")
            }
    except (SafetensorError, OSError) as error:
        with file.open("rb") as opened:
            pointer = opened.read(40).startswith(b"version https://git-lfs")
        if pointer:
            what, remedy = "is a pointer of Git LFS, not the weights", "run `git lfs pull` there"
        else:
            what, remedy = f"is damaged or cut short ({_first_line(error)})", "copy it again"
        raise UserError(f"model '{name}': '{file.name}' {what}; {remedy}.") from None
    if codes := [key for key, kind in kinds.items() if kind not in FLOATS]:
        raise UserError(
            f"model '{name}': {listed(codes)} is stored as {kinds[min(codes)]}, the codes of a "
            "quantized checkpoint whose config.json does not say how to read them; give the float "
            "weights it was made from."
        )
    return names


def _without_weights(folder: Path) -> str:
    files = sorted(file.name for file in folder.iterdir())
    pickles = [file for file in files if file.endswith(PICKLES)]
    stored = [file for file in files if file.endswith(".safetensors")]
    if pickles:
        return (
            f"has its weights as {listed(pickles)}, a pickle, which may run code when it is read "
            f"and is never opened; expected {SINGLE}: take the repository's safetensors, or "
            "convert it with transformers' save_pretrained."
        )
    if any(file.endswith(".gguf") for file in files):
        return f"has its weights as a GGUF file; expected {SINGLE}, from the base it was made of."
    if stored:
        return (
            f"holds {listed(stored)}, but neither {SINGLE} nor {INDEX}, which maps tensors to "
            "files; copy that file too."
        )
    return f"holds no weights; expected {SINGLE}."


def check_loaded(model: Any, info: Mapping[str, Any], name: str) -> list[str]:
    """Refuse a model that is not what its checkpoint holds; returns the tensors ignored.

    ``info`` is what ``from_pretrained(output_loading_info=True)`` returns beside the model, with
    tied and recomputed tensors left out already.

    Raises:
        UserError: tensors are missing, unexpected, of another shape or without values.
    """
    missing = sorted(info["missing_keys"])
    unexpected = sorted(key for key in info["unexpected_keys"] if not COMPUTED.search(key))
    harmless = [key for key in unexpected if NOT_FOR_TEXT.search(key)]
    unknown = [key for key in unexpected if key not in set(harmless)]
    if missing:
        raise UserError(_missing(model, missing, unknown, name))
    if unknown:
        raise UserError(_unexpected(model, unknown, name))
    if wrong := sorted([*info["mismatched_keys"], *_misshapen(model)]):
        tensor, stored, expected = wrong[0]
        raise UserError(
            f"model '{name}': '{tensor}' is {list(stored)} in the checkpoint, and its config.json "
            f"asks for {list(expected)}{_more(wrong)}; the two are not of one model."
        )
    if errors := info.get("error_msgs"):
        raise UserError(f"model '{name}' cannot be loaded: {_first_line(errors[0])}")
    if empty := [n for n, p in model.named_parameters() if p.device.type == "meta"]:
        raise UserError(f"model '{name}': {listed(empty)} got no values; copy the model again.")
    return harmless


def _misshapen(model: Any) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Quantized weights of another shape than their module's: transformers reports none."""
    found: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
            state = getattr(module.weight, "quant_state", None)  # 4 bits are packed
            stored = tuple(module.weight.shape if state is None else state.shape)
            if stored != (expected := (module.out_features, module.in_features)):
                found.append((f"{name}.weight", stored, expected))
    return found


def _missing(model: Any, missing: list[str], unknown: list[str], name: str) -> str:
    text = f"model '{name}' lacks {listed(missing)} of a {type(model).__name__}"
    if missing == ["lm_head.weight"] and not unknown:
        return (
            f"{text}, and tie_word_embeddings is false in its config.json, so that no output layer "
            "can be made; give the whole checkpoint, or set it true if the embeddings were tied."
        )
    if unknown:
        return f"{text}, but holds {listed(unknown)}; {_remedy(unknown, 'rename them')}."
    return f"{text}; copy the checkpoint again, these would be drawn at random."


def _unexpected(model: Any, unknown: list[str], name: str) -> str:
    cause = "config.json and weights are not of one model"
    return (
        f"model '{name}' holds {listed(unknown)}, for which a {type(model).__name__} of its "
        f"config.json has no place; {_remedy(unknown, cause)}."
    )


def _remedy(unknown: list[str], usual: str) -> str:
    if any(".lora_" in key or ".base_layer." in key for key in unknown):
        return "these are of an adapter that was not merged: merge it, or give the base alone"
    if any(key.endswith((".qweight", ".absmax", ".weight_scale", ".scales")) for key in unknown):
        return "these are of a quantized checkpoint: give the float weights it was made from"
    return usual


def listed(names: Iterable[str]) -> str:
    """The first few names, and how many there are."""
    names = sorted(names)
    shown = ", ".join(f"'{name}'" for name in names[:SHOWN])
    return f"{shown} and {len(names) - SHOWN} more" if len(names) > SHOWN else shown


def _more(found: list[Any]) -> str:
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
