"""Every random draw comes from ``(seed, round, client, purpose)``.

A draw is named, not numbered: two parts of the program never share a stream, and adding a draw
somewhere does not move the draws elsewhere. There is no global generator. What privacy rests on
has a ``secret_seed``: everybody in a run knows the run's.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch

__all__ = ["derive_seed", "generator", "numpy_generator", "secret_seed"]


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed that is a pure function of ``seed`` and the named purpose (SHA-256)."""
    parts = "\x1f".join([str(int(seed)), *(f"{type(part).__name__}:{part}" for part in purpose)])
    return int.from_bytes(hashlib.sha256(parts.encode()).digest()[:8], "big") >> 1


def secret_seed() -> int:
    """63 bits of the operating system's randomness, for draws that protect somebody."""
    return secrets.randbits(63)


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU ``torch.Generator`` for one purpose."""
    import torch

    return torch.Generator().manual_seed(derive_seed(seed, *purpose))


def numpy_generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """A NumPy generator for one purpose."""
    import numpy as np

    return np.random.default_rng(derive_seed(seed, *purpose))
