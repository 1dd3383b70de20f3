"""Encode adapters as raw little-endian bytes and plain values; nothing is pickled.

An array is a dtype name, a shape and bytes, the fields of Flower's ``Array``. The receiver decodes
to float32. ``bfloat16`` halves the bytes, ``int8`` quarters them:

    x = scale * code,   code in -127 .. 127,   scale = max |x| / 127 over one direction of the rank

A direction is a row of ``lora_A`` and a column of ``lora_B``: with a scale for each row of
``lora_B`` the weak directions would be rounded at the step of the strongest. The float32 scales
come before the codes and have 17 significant bits, so that ``scale * code`` is exact and encoding
again changes nothing. If the receiver has the factors that training started from (``held``), int8
sends the change from them when its norm is the smaller, and rounds relative to that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from flexlora.errors import UpdateRefused
from flexlora.lora.adapters import Adapter, LoRAFactors

__all__ = [
    "DTYPES",
    "FACTORS",
    "RAW",
    "ArrayLike",
    "WireArray",
    "decode_adapter",
    "encode_adapter",
    "encoded_bytes",
    "factor_bytes",
    "over_the_wire",
]

FACTORS = ("lora_A", "lora_B")
RAW = "flexlora.raw"  # the serialization name that Flower's Array carries
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
# The dimension with a scale per entry, and whether the numbers are a change of ``held``.
INT8 = {
    "int8.rows": (0, False),
    "int8.columns": (1, False),
    "int8.rows.change": (0, True),
    "int8.columns.change": (1, True),
}
ALONG_RANK = {"lora_A": "int8.rows", "lora_B": "int8.columns"}
LARGEST_CODE = 127
LARGEST_SCALE = 2.0**121  # 127 of it are still a float32
SCALE_BYTES = torch.float32.itemsize
BELOW_17_BITS = 0x7F  # the last seven of float32's 24 significant bits


class ArrayLike(Protocol):
    """What ``decode_adapter`` reads of an array; Flower's ``Array`` is one."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def stype(self) -> str: ...
    @property
    def data(self) -> bytes | memoryview: ...


@dataclass(frozen=True, kw_only=True)
class WireArray:
    """One tensor in transit; ``data`` may be a view of the memory it was made from."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview
    stype: str = RAW


def encode_adapter(
    adapter: Adapter,
    dtype: str,
    labels: Sequence[str] = FACTORS,
    held: Adapter | None = None,
) -> tuple[dict[str, WireArray], dict[str, list]]:
    """Arrays named ``MODULE.lora_A`` and ``MODULE.lora_B``, and the alphas beside them.

    Only the factors in ``labels`` are sent. With ``held``, what the receiver has of all factors (to
    the bit), int8 may send changes.
    """
    arrays = {}
    for name, factors in adapter.items():
        for label in labels:
            tensor = getattr(factors, label).detach().cpu()
            if dtype == "int8":
                array = _int8_array(tensor.float(), ALONG_RANK[label], _held(held, name, label))
            else:
                tensor = tensor.to(DTYPES[dtype])
                array = WireArray(dtype=dtype, shape=tuple(tensor.shape), data=_bytes(tensor))
            arrays[f"{name}.{label}"] = array
    values: dict[str, list] = {
        "modules": list(adapter),
        "alphas": [float(factors.alpha) for factors in adapter.values()],
        "rslora": [factors.rslora for factors in adapter.values()],
    }
    return arrays, values


def _held(held: Adapter | None, name: str, label: str) -> Tensor | None:
    """The receiver's factor, None if it has none."""
    return getattr(held[name], label) if held is not None and name in held else None


def _bytes(tensor: Tensor) -> memoryview:
    """The tensor's memory, not copied."""
    return tensor.contiguous().view(torch.uint8).numpy().data.cast("B")


def _int8_array(tensor: Tensor, kind: str, held: Tensor | None) -> WireArray:
    """Scales and codes of a factor, or of its change from ``held`` if that is smaller."""
    if held is not None and held.shape == tensor.shape:
        change = tensor - held.detach().cpu().float()
        if float(change.norm()) < float(tensor.norm()):
            kind, tensor = f"{kind}.change", change
    scales, codes = _rounded(tensor, INT8[kind][0])
    return WireArray(
        dtype=kind, shape=tuple(tensor.shape), data=b"".join((_bytes(scales), _bytes(codes)))
    )


def _rounded(tensor: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """One scale for every entry of ``dim``, and the codes.

    A row too small for a scale becomes zeros. NaN or infinity gives a NaN scale, which the receiver
    refuses: rounding must not hide that a training diverged.
    """
    largest = tensor.abs().amax(dim=1 - dim, keepdim=True)
    bits = (largest / LARGEST_CODE).view(torch.int32)
    scales = ((bits + BELOW_17_BITS) & ~BELOW_17_BITS).view(torch.float32)  # upwards
    scales = scales.clamp(max=LARGEST_SCALE)
    scales = torch.where(scales < torch.finfo(torch.float32).tiny, 0.0, scales)
    codes = (tensor / torch.where(scales > 0, scales, 1.0)).round()
    codes = codes.nan_to_num(0.0).clamp(-LARGEST_CODE, LARGEST_CODE).to(torch.int8)
    scales = torch.where(torch.isfinite(largest), scales, torch.nan)
    return scales.flatten(), codes


def encoded_bytes(adapter: Adapter, dtype: str, labels: Sequence[str] = FACTORS) -> int:
    """Bytes of the arrays that ``encode_adapter`` makes."""
    numbers = sum(getattr(f, label).numel() for f in adapter.values() for label in labels)
    if dtype == "int8":
        return numbers + SCALE_BYTES * len(labels) * sum(f.rank for f in adapter.values())
    return numbers * DTYPES[dtype].itemsize


def decode_adapter(
    arrays: Mapping[str, ArrayLike],
    values: Mapping[str, list],
    *,
    labels: Sequence[str] = FACTORS,
    held: Adapter | None = None,
) -> Adapter:
    """The inverse of ``encode_adapter``: float32 factors (float64 stays).

    Factors not in ``labels`` are taken from ``held``; changes are added to it.

    Raises:
        UpdateRefused: arrays and names that do not match, an unknown dtype, bytes that do not fit
            the shape, invalid scales, a change without ``held``, factors of unequal rank.
    """
    try:
        names, alphas, rslora = values["modules"], values["alphas"], values["rslora"]
    except KeyError as error:
        raise UpdateRefused(f"the list of {error} is missing beside the arrays.") from None
    if not names:
        raise UpdateRefused("there are no modules, expected at least one.")
    wanted = {f"{name}.{label}" for name in names for label in labels}
    if set(arrays) != wanted or not len(names) == len(alphas) == len(rslora):
        odd = sorted(set(arrays) ^ wanted)
        raise UpdateRefused(f"the arrays and the module list differ in {odd[:1] or 'length'}.")
    modules = {}
    for name, alpha, plain in zip(names, alphas, rslora, strict=True):
        tensors = {
            label: _tensor(f"{name}.{label}", arrays, _held(held, name, label)) for label in labels
        }
        for label in set(FACTORS) - set(labels):
            unsent = _held(held, name, label)
            if unsent is None:
                raise UpdateRefused(f"module '{name}' has no {label}, and nothing is held for it.")
            tensors[label] = unsent
        try:
            modules[name] = LoRAFactors(**tensors, alpha=float(alpha), rslora=bool(plain))
        except ValueError as error:
            raise UpdateRefused(f"module '{name}': {error}") from None
    return Adapter(modules)


def factor_bytes(key: str, kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a factor of this dtype or kind; the shape may be anything that a node sends.

    Raises:
        UpdateRefused: an unknown kind, a shape that is not two dimensions from 1 up.
    """
    if kind not in DTYPES and kind not in INT8:
        known = ", ".join([*DTYPES, *INT8])
        raise UpdateRefused(f"array '{key}' is '{kind:.40}', expected one of {known}.")
    if len(shape) != 2 or min(shape) < 1:
        raise UpdateRefused(f"array '{key}' has shape {shape}, expected two dimensions from 1 up.")
    if kind in INT8:
        return SCALE_BYTES * shape[INT8[kind][0]] + prod(shape)
    return DTYPES[kind].itemsize * prod(shape)


def _tensor(key: str, arrays: Mapping[str, ArrayLike], held: Tensor | None) -> Tensor:
    array, shape = arrays[key], tuple(arrays[key].shape)
    if array.stype != RAW:
        raise UpdateRefused(f"array '{key}' is serialized as '{array.stype:.40}', expected {RAW}.")
    expected = factor_bytes(key, array.dtype, shape)
    if len(array.data) != expected:
        raise UpdateRefused(
            f"array '{key}' has {len(array.data)} bytes for shape {shape} in {array.dtype}, "
            f"expected {expected}."
        )
    if array.dtype in INT8:
        return _from_int8(key, array, shape, held)
    dtype = DTYPES[array.dtype]
    tensor = _numbers(array.data, dtype).reshape(shape)
    return tensor if dtype == torch.float64 else tensor.to(torch.float32)


def _from_int8(key: str, array: ArrayLike, shape: tuple[int, ...], held: Tensor | None) -> Tensor:
    """``scale * code``, added to ``held`` if it is a change."""
    dim, is_change = INT8[array.dtype]
    split = SCALE_BYTES * shape[dim]
    scales = _numbers(array.data[:split], torch.float32)
    codes = _numbers(array.data[split:], torch.int8).reshape(shape)
    odd = scales[~((scales >= 0) & (scales <= LARGEST_SCALE))]
    if len(odd) or bool((codes < -LARGEST_CODE).any()):
        what = f"a scale of {float(odd[0])}" if len(odd) else f"a code below {-LARGEST_CODE}"
        raise UpdateRefused(
            f"array '{key}' has {what}, expected finite scales from 0 up. Did training diverge?"
        )
    tensor = scales.unsqueeze(1 - dim) * codes
    if not is_change:
        return tensor
    if held is None or held.shape != tensor.shape:
        known = "nothing" if held is None else f"shape {tuple(held.shape)}"
        raise UpdateRefused(f"array '{key}' is a change of shape {shape}, and {known} is held.")
    return held.detach().cpu().float() + tensor


def _numbers(data: bytes | memoryview, dtype: torch.dtype) -> Tensor:
    """A tensor with a copy of the bytes."""
    return torch.frombuffer(bytearray(data), dtype=dtype)


def over_the_wire(
    adapter: Adapter,
    dtype: str,
    labels: Sequence[str] = FACTORS,
    held: Adapter | None = None,
) -> Adapter:
    """The adapter as the receiver decodes it, which is what a client starts from."""
    return decode_adapter(*encode_adapter(adapter, dtype, labels, held), labels=labels, held=held)
