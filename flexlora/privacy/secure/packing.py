"""Numbers below 2^bits as bytes without gaps: 18 bits take 18, where an array would take 32.

A number is cut into its low byte (or two) and the ``rest < 8`` bits above it:

    bytes = low parts of all numbers | rests, eight of them in ``rest`` bytes

so that both parts are whole bytes and numpy packs ten million numbers in a fraction of a second.
"""

from __future__ import annotations

import numpy as np

__all__ = ["LARGEST_BITS", "LEAST_BITS", "pack_bits", "packed_bytes", "unpack_bits"]

LEAST_BITS, LARGEST_BITS = 8, 23
GROUP = 8  # numbers whose rests fill whole bytes


def packed_bytes(count: int, bits: int) -> int:
    """The length of ``count`` packed numbers."""
    low, rest = _split(bits)
    return count * low + -(-count // GROUP) * rest


def pack_bits(numbers: np.ndarray, bits: int) -> bytes:
    """The numbers ``[count]``, uint32 below ``2^bits``; bits above are dropped."""
    low, rest = _split(bits)
    kind = np.dtype("u1" if low == 1 else "<u2")
    parts = [numbers.astype(kind).tobytes()]
    if rest:
        missing = -len(numbers) % GROUP
        high = (np.pad(numbers, (0, missing)) >> np.uint32(8 * low)).reshape(-1, GROUP)
        mask, packed = np.uint64(2**rest - 1), np.zeros(len(high), dtype="<u8")
        for place in range(GROUP):
            packed |= (high[:, place].astype("<u8") & mask) << np.uint64(rest * place)
        parts.append(packed.view("u1").reshape(-1, 8)[:, :rest].tobytes())
    return b"".join(parts)


def unpack_bits(data: bytes | memoryview, bits: int, count: int) -> np.ndarray:
    """The inverse of ``pack_bits``: uint32 ``[count]``.

    Raises:
        ValueError: another length than ``count`` numbers have.
    """
    low, rest = _split(bits)
    expected = packed_bytes(count, bits)
    if len(data) != expected:
        raise ValueError(
            f"{len(data):,} bytes, expected {expected:,} for {count:,} numbers of {bits} bits"
        )
    kind = np.dtype("u1" if low == 1 else "<u2")
    numbers = np.frombuffer(data, kind, count).astype(np.uint32)
    if rest:
        groups = -(-count // GROUP)
        wide = np.zeros((groups, 8), dtype="u1")
        wide[:, :rest] = np.frombuffer(data, "u1", offset=count * low).reshape(groups, rest)
        packed, mask = wide.view("<u8").reshape(-1), np.uint64(2**rest - 1)
        shifts = np.arange(GROUP, dtype=np.uint64) * np.uint64(rest)
        high = ((packed[:, None] >> shifts) & mask).astype(np.uint32).reshape(-1)[:count]
        numbers |= high << np.uint32(8 * low)
    return numbers


def _split(bits: int) -> tuple[int, int]:
    """Whole bytes of a number, and the bits above them."""
    if not LEAST_BITS <= bits <= LARGEST_BITS:
        raise ValueError(f"{bits} bits, expected {LEAST_BITS} to {LARGEST_BITS}")
    low = min(2, bits // 8)
    return low, bits - 8 * low
