"""The bounds of an engine, and the counts that a metrics page shows."""

from __future__ import annotations

from dataclasses import dataclass

from flexlora.errors import UserError

__all__ = ["Limits", "Stats"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of the engine.

    Args:
        max_running: requests that share a pass.
        max_waiting: requests in the queue; beyond it ``submit`` raises ``EngineFull``.
        max_length: tokens of prompt and answer together, 0: the model's positions.
        prefill_tokens: prompt tokens of one step, so that running answers go on meanwhile.
        cache_bytes: keys and values of all running requests.

    Raises:
        UserError: a bound below 1, a negative length.
    """

    max_running: int = 64
    max_waiting: int = 256
    max_length: int = 0
    prefill_tokens: int = 512
    cache_bytes: int = 2**30

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 0 if name == "max_length" else 1
            if value < least:
                raise UserError(f"{name} is {value}, expected at least {least}.")


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What a metrics page shows; ``steps`` to ``failed``, loads and evictions since the start."""

    running: int = 0
    waiting: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    adapters: int = 0
    adapters_on_device: int = 0
    adapter_bytes: int = 0
    adapter_loads: int = 0
    adapter_evictions: int = 0
    cache_bytes: int = 0
    cache_bytes_used: int = 0
