"""One number for a base, the same wherever the same base is loaded.

Two copies are the same base when they store the same tensors, by name and shape, whose values agree
as bfloat16, and when the settings that change what the tensors compute are equal. So one base has
one fingerprint as float32, bfloat16, 8-bit or NF4, in one file or in many, with or without a copy
of a tied output layer. Another draw of a layer, a fine-tuned copy or another ``rope_theta`` give
another. float16 rounds small numbers otherwise than bfloat16: a float16 copy may be another base.

Read from the files, not from the loaded modules, since a quantized module no longer holds the
numbers. Of each tensor at most 2048 numbers are read, 4 runs of 512 from the first to the last, so
a change that misses them all is not seen. NaN and infinity are refused in what is read here, and
anywhere in files of up to 16 MiB: to read all of a large base costs a tenth of its loading.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load_file

from flexlora.errors import UserError
from flexlora.training.base_model import text_config
from flexlora.training.checkpoint import COMPUTED, Checkpoint, listed

__all__ = ["fingerprint"]

RUNS, RUN = 4, 512  # runs read of a large tensor, and the numbers of each
WHOLE_BYTES = 16 * 2**20  # files up to this size are searched for NaN as a whole

# Equal tensors compute something else where one of these differs.
SETTINGS = (
    *("model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("hidden_act", "hidden_activation", "activation_function", "rms_norm_eps", "layer_norm_eps"),
    *("layer_norm_epsilon", "rope_parameters", "sliding_window", "layer_types"),
    *("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
)

# The names of a safetensors header; numbers of another kind are compared byte by byte.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def fingerprint(model: Any, checkpoint: Checkpoint) -> str:
    """SHA-256 over names, shapes, sampled values as bfloat16 and settings; 32 hex digits.

    Raises:
        UserError: a sampled number is NaN or infinite.
    """
    config = text_config(model.config)
    settings = {key: getattr(config, key, None) for key in SETTINGS}
    sha = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    digests, broken = {}, []
    for file, names in _counted(model, checkpoint).by_file().items():
        for name, sample, finite in _samples(file, names):
            digests[_model_name(model, name)] = hashlib.sha256(sample).digest()
            if not finite:
                broken.append(name)
        if file.stat().st_size <= WHOLE_BYTES:
            tensors = load_file(file)
            floats = [n for n in names if tensors[n].dtype in FLOATS.values()]
            broken = sorted({*broken, *(n for n in floats if not tensors[n].isfinite().all())})
    if broken:
        raise UserError(
            f"model '{checkpoint.name}': {listed(broken)} in the checkpoint is not finite (holds "
            "NaN or infinity); copy the checkpoint again, or take another version of it."
        )
    kept = _without_copies(model, digests)
    for name in sorted(kept):
        sha.update(f"{name}|".encode() + kept[name])
    return sha.hexdigest()[:32]


def _counted(model: Any, checkpoint: Checkpoint) -> Checkpoint:
    """Without buffers that are computed and tensors that the model's class leaves out itself."""
    left_out = [COMPUTED, *map(re.compile, model._keys_to_ignore_on_load_unexpected or ())]
    names = [name for name in checkpoint.files if any(p.search(name) for p in left_out)]
    return checkpoint.without(names)


def _samples(file: Path, names: list[str]) -> Iterator[tuple[str, bytes, bool]]:
    """Name, shape and sample as bytes, and whether the sample is finite, of a file's tensors.

    All samples of one kind of number are converted together: a tensor costs 4 short reads.
    """
    with file.open("rb", buffering=0) as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        for kind in sorted({header[name]["dtype"] for name in names}):
            chosen = [name for name in names if header[name]["dtype"] == kind]
            raw = [_sampled_bytes(opened, header[name], 8 + size) for name in chosen]
            yield from _as_bfloat16(kind, chosen, raw, header)


def _as_bfloat16(
    kind: str, names: list[str], raw: list[bytes], header: dict[str, Any]
) -> Iterator[tuple[str, bytes, bool]]:
    joined, scale = b"".join(raw), 1.0
    bad: list[int] = []
    if kind in FLOATS and joined:
        numbers = torch.frombuffer(bytearray(joined), dtype=FLOATS[kind])
        bad = torch.nonzero(~torch.isfinite(numbers)).flatten().tolist()
        joined = numbers.to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
        scale = 2 / FLOATS[kind].itemsize
    at = 0
    for name, part in zip(names, raw, strict=True):
        length = round(len(part) * scale)
        shape = tuple(header[name]["shape"])
        finite = not any(at <= 2 * position < at + length for position in bad)
        yield name, f"{shape}|".encode() + joined[at : at + length], finite
        at += length


def _sampled_bytes(opened: BinaryIO, entry: dict[str, Any], start: int) -> bytes:
    """The tensor's bytes if it is small, else those of ``RUNS`` runs spread evenly over it."""
    begin, end = entry["data_offsets"]
    count = 1
    for side in entry["shape"]:
        count *= side
    width = (end - begin) // max(1, count)
    if count <= RUNS * RUN:
        return os.pread(opened.fileno(), end - begin, start + begin)
    places = [start + begin + width * (k * (count - RUN) // (RUNS - 1)) for k in range(RUNS)]
    return b"".join([os.pread(opened.fileno(), RUN * width, place) for place in places])


def _model_name(model: Any, name: str) -> str:
    """The name without the prefix of the inner model, which some copies store and others do not."""
    return name.removeprefix(f"{model.base_model_prefix}.")


def _without_copies(model: Any, digests: dict[str, bytes]) -> dict[str, bytes]:
    """The tensors without the copies of tied ones; a tied tensor has the name of its source."""
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        copy = digests.pop(_model_name(model, target), None)
        if copy is not None:
            digests.setdefault(_model_name(model, source), copy)
    return digests
