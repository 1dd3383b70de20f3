"""Resident memory of this process, as Linux counts it: now, and at its highest since a reset.

The peak is ``VmHWM``: ``ru_maxrss`` is inherited from the process that starts this one, and a large
parent would hide all growth.
"""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

__all__ = ["peak_bytes", "reset_peak", "settled_bytes"]


def settled_bytes() -> int:
    """Resident bytes, after what is free has gone back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def reset_peak() -> None:
    """Let the peak begin anew at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes() -> int:
    """The most that was resident since ``reset_peak``."""
    return _status("VmHWM")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}, expected a Linux kernel that counts it.")
