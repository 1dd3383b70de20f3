"""Pack all adapters of a message into one contiguous byte string, with an index beside it.

Flower sends every array as an object of its own, by two requests, so that a model of 200 modules
costs hundreds of requests a message where one does. An array is three objects, and up to
``MOST_INLINE`` bytes are none: they travel as a value beside the index. The factors follow each
other without gaps, in the order of

    for each adapter, for each of its modules, for each label: kind, rows, columns

so that no factor has an offset which could overlap another. The index is lists of scalars, which
any transport can hold:

    adapters, sizes             names, and how many modules each has
    modules, alphas, rslora     one entry for each module
    labels                      the factors that are sent, the same for all modules
    kinds, rows, columns        one entry for each factor

Every count and every size is checked against the bytes that came before a tensor is made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from flexlora.errors import UpdateRefused, UserError
from flexlora.wire.encoding import FACTORS, RAW, ArrayLike, WireArray, factor_bytes

__all__ = [
    "DATA",
    "INDEX",
    "MOST_INLINE",
    "PACKED",
    "VERSION_KEY",
    "WIRE_VERSION",
    "Encoded",
    "check_version",
    "pack_adapters",
    "unpack_adapters",
]

WIRE_VERSION = 2  # of jobs and replies: raised with every change that another version cannot read
PACKED = "packed"  # the one array, the record that holds it, and the prefix of the index's keys
DATA = f"{PACKED}/data"  # in the array's place, where there are at most so many bytes:
MOST_INLINE = 2 * 2**20  # gRPC takes messages of 4 MiB
INDEX: Mapping[str, type] = {
    "adapters": str,
    "sizes": int,
    "modules": str,
    "alphas": float,
    "rslora": bool,
    "labels": str,
    "kinds": str,
    "rows": int,
    "columns": int,
}

VERSION_KEY = "wire-version"  # in a job; a capability has it as ``wire_version``
Encoded = tuple[Mapping[str, WireArray], Mapping[str, list]]  # what encode_adapter returns


def check_version(job: Mapping[str, Any]) -> None:
    """Refuse a job in another format.

    Raises:
        UserError: it has another version, or none.
    """
    version = job.get(VERSION_KEY, 0)
    if version != WIRE_VERSION:
        raise UserError(
            f"the server's messages have wire version {version!s:.20}, this node reads "
            f"{WIRE_VERSION}; update the older of the two."
        )


def pack_adapters(adapters: Mapping[str, Encoded]) -> tuple[WireArray | None, dict[str, Any]]:
    """One array of bytes with every factor, and its index under the keys ``packed/...``.

    There is no array where the bytes are few enough to be in the index, as ``DATA``.

    All adapters must be encoded with the same labels.
    """
    index: dict[str, list] = {key: [] for key in INDEX}
    for name, (arrays, values) in adapters.items():
        modules = values["modules"]
        index["adapters"].append(name)
        index["sizes"].append(len(modules))
        for key in ("modules", "alphas", "rslora"):
            index[key] += values[key]
        index["labels"] = [label for label in FACTORS if f"{modules[0]}.{label}" in arrays]
        index["kinds"] += [array.dtype for array in arrays.values()]
        index["rows"] += [array.shape[0] for array in arrays.values()]
        index["columns"] += [array.shape[1] for array in arrays.values()]
    data = b"".join(array.data for arrays, _ in adapters.values() for array in arrays.values())
    record: dict[str, Any] = {f"{PACKED}/{key}": value for key, value in index.items()}
    if len(data) <= MOST_INLINE:
        return None, {**record, DATA: data}
    return WireArray(dtype="uint8", shape=(len(data),), data=data), record


def unpack_adapters(
    arrays: Mapping[str, ArrayLike], record: Mapping[str, Any], expected: Sequence[str]
) -> dict[str, Encoded]:
    """The inverse of ``pack_adapters``: for each adapter the arguments of ``decode_adapter``.

    The arrays are views of the packed bytes. ``record`` may hold other keys beside the index.

    Raises:
        UpdateRefused: adapters other than ``expected``, an index that contradicts itself, names
            given twice, sizes that do not fit the bytes.
    """
    data = _packed_bytes(arrays, record)
    index = {key: _column(record, key, kind) for key, kind in INDEX.items()}
    names, sizes, labels = index["adapters"], index["sizes"], index["labels"]
    if names != list(expected):
        raise UpdateRefused(f"the adapters are {_few(names)}, expected {_few(list(expected))}.")
    if not labels or [label for label in FACTORS if label in labels] != labels:
        raise UpdateRefused(f"the factors are {_few(labels)}, expected {' and '.join(FACTORS)}.")
    _check_counts(index)
    keys = [f"{module}.{label}" for module in index["modules"] for label in labels]
    factors = zip(keys, _factors(data, keys, index), strict=True)
    unpacked: dict[str, Encoded] = {}
    at = 0
    for name, size in zip(names, sizes, strict=True):
        values = {key: index[key][at : at + size] for key in ("modules", "alphas", "rslora")}
        module, count = Counter(values["modules"]).most_common(1)[0]
        if count > 1:
            raise UpdateRefused(f"adapter '{name}': module '{module:.80}' comes {count} times.")
        unpacked[name] = dict(islice(factors, size * len(labels))), values
        at += size
    return unpacked


def _packed_bytes(arrays: Mapping[str, ArrayLike], record: Mapping[str, Any]) -> memoryview:
    inline = record.get(DATA)
    if isinstance(inline, bytes) and not arrays:
        return memoryview(inline)
    if inline is not None:
        raise UpdateRefused(
            f"'{DATA}' is {type(inline).__name__} beside {len(arrays)} arrays, "
            "expected bytes and no array."
        )
    if list(arrays) != [PACKED]:
        raise UpdateRefused(f"the arrays are {_few(list(arrays))}, expected one named '{PACKED}'.")
    array = arrays[PACKED]
    if (array.stype, array.dtype, tuple(array.shape)) != (RAW, "uint8", (len(array.data),)):
        raise UpdateRefused(
            f"the array is {array.stype[:40]}/{array.dtype[:40]} of shape {_few(array.shape)}, "
            f"expected {RAW}/uint8 of shape [{len(array.data)}]."
        )
    return memoryview(array.data)


def _column(record: Mapping[str, Any], key: str, kind: type) -> list:
    column = record.get(f"{PACKED}/{key}")
    if not isinstance(column, list):
        raise UpdateRefused(f"the index has no list '{key}'.")
    if odd := [value for value in column if type(value) is not kind]:
        raise UpdateRefused(f"the index has {odd[0]!r:.80} in '{key}', expected {kind.__name__}.")
    return column


def _check_counts(index: Mapping[str, list]) -> None:
    """Refuse lists whose lengths do not match."""
    modules, sizes = len(index["modules"]), index["sizes"]
    if min(sizes, default=1) < 1 or sum(sizes) != modules or len(sizes) != len(index["adapters"]):
        raise UpdateRefused(f"the adapters have {_few(sizes)} modules, and {modules} are named.")
    counts = dict.fromkeys(("alphas", "rslora"), modules)
    counts |= dict.fromkeys(("kinds", "rows", "columns"), modules * len(index["labels"]))
    for key, count in counts.items():
        if len(index[key]) != count:
            raise UpdateRefused(f"the index has {len(index[key])} {key}, expected {count}.")


def _factors(data: memoryview, keys: Sequence[str], index: Mapping[str, list]) -> list[WireArray]:
    """Views of all factors; refuses sizes that do not fill the bytes exactly."""
    spans, at = [], 0
    shapes = zip(index["rows"], index["columns"], strict=True)
    for key, kind, shape in zip(keys, index["kinds"], shapes, strict=True):
        size = factor_bytes(key, kind, shape)
        spans.append((kind, shape, at, at + size))
        at += size
    if at != len(data):
        raise UpdateRefused(f"there are {len(data)} bytes, the index is for {at}.")
    return [
        WireArray(dtype=kind, shape=shape, data=data[start:end])
        for kind, shape, start, end in spans
    ]


def _few(values: Sequence) -> str:
    """At most three of the values, each cut: what a node sends may be long."""
    shown = ", ".join(f"{value!s:.40}" for value in values[:3])
    return f"[{shown}{', ...' if len(values) > 3 else ''}]"
