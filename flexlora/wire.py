"""Adapters as raw little-endian bytes and plain values: what travels, whatever the transport.

Nothing is pickled. An array is a dtype name, a shape and bytes; Flower's ``Array`` has the same
fields, so the transport wraps and unwraps it without looking inside. ``bfloat16`` halves the bytes;
the receiver continues in float32 from the rounded numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch

from flexlora.adapters import Adapter, LoRAFactors
from flexlora.errors import UpdateRefused

__all__ = ["DTYPES", "RAW", "WireArray", "decode_adapter", "encode_adapter", "over_the_wire"]

FACTORS = ("lora_A", "lora_B")
RAW = "flexlora.raw"  # the serialization name that Flower's Array carries
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class ArrayLike(Protocol):
    """What ``decode_adapter`` reads of an array; Flower's ``Array`` is one."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def stype(self) -> str: ...
    @property
    def data(self) -> bytes: ...


@dataclass(frozen=True, kw_only=True)
class WireArray:
    """One tensor in transit."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes
    stype: str = RAW


def encode_adapter(
    adapter: Adapter, dtype: str, labels: Sequence[str] = FACTORS
) -> tuple[dict[str, WireArray], dict[str, list]]:
    """Arrays named ``MODULE.lora_A`` and ``MODULE.lora_B``, and the alphas beside them.

    ``labels`` leaves out factors that the other side holds already.
    """
    arrays = {}
    for name, factors in adapter.items():
        for label in labels:
            tensor = getattr(factors, label).detach().cpu().to(DTYPES[dtype]).contiguous()
            data = tensor.view(torch.uint8).numpy().tobytes()
            arrays[f"{name}.{label}"] = WireArray(dtype=dtype, shape=tuple(tensor.shape), data=data)
    values: dict[str, list] = {
        "modules": list(adapter),
        "alphas": [float(factors.alpha) for factors in adapter.values()],
        "rslora": [factors.rslora for factors in adapter.values()],
    }
    return arrays, values


def decode_adapter(
    arrays: Mapping[str, ArrayLike],
    values: Mapping[str, list],
    *,
    labels: Sequence[str] = FACTORS,
    held: Adapter | None = None,
) -> Adapter:
    """The adapter behind ``encode_adapter``, float32 (float64 stays).

    Factors that are not among ``labels`` are taken from ``held``.

    Raises:
        UpdateRefused: arrays and names that do not match, an unknown dtype, bytes that are not the
            shape's, factors that do not pair up.
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
        tensors = {label: _tensor(f"{name}.{label}", arrays) for label in labels}
        for label in set(FACTORS) - set(labels):
            if held is None or name not in held:
                raise UpdateRefused(f"module '{name}' has no {label}, and nothing is held for it.")
            tensors[label] = getattr(held[name], label)
        try:
            modules[name] = LoRAFactors(**tensors, alpha=float(alpha), rslora=bool(plain))
        except ValueError as error:
            raise UpdateRefused(f"module '{name}': {error}") from None
    return Adapter(modules)


def _tensor(key: str, arrays: Mapping[str, ArrayLike]) -> torch.Tensor:
    array = arrays[key]
    if array.stype != RAW or array.dtype not in DTYPES:
        raise UpdateRefused(
            f"array '{key}' is {array.stype}/{array.dtype}, "
            f"expected {RAW} with {', '.join(DTYPES)}."
        )
    dtype = DTYPES[array.dtype]
    if min(array.shape, default=0) < 0:
        raise UpdateRefused(f"array '{key}' has shape {tuple(array.shape)}, expected no negatives.")
    if len(array.data) != prod(array.shape) * dtype.itemsize:
        raise UpdateRefused(
            f"array '{key}' has {len(array.data)} bytes for shape {tuple(array.shape)} in "
            f"{array.dtype}, expected {prod(array.shape) * dtype.itemsize}."
        )
    flat = torch.frombuffer(bytearray(array.data), dtype=dtype) if array.data else torch.empty(0)
    tensor = flat.reshape(tuple(array.shape))
    return tensor if dtype == torch.float64 else tensor.to(torch.float32)


def over_the_wire(adapter: Adapter, dtype: str) -> Adapter:
    """The adapter as the other side decodes it: what a client really starts from."""
    return decode_adapter(*encode_adapter(adapter, dtype))
