"""Continuous batching: requests for adapters of unequal rank, in one forward pass per step.

Requests join and leave between steps (Orca, OSDI 2022); adapters share a pass as in S-LoRA
(arXiv 2311.03285) and Punica (arXiv 2310.18547).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from flexlora.serving.adapter_store import AdapterStore
from flexlora.serving.requests import Piece, Request
from flexlora.training.base_model import BaseModel

__all__ = ["Engine", "Limits", "Stats"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of the engine.

    Args:
        max_running: requests that share a pass.
        max_waiting: requests in the queue; beyond it ``submit`` raises ``EngineFull``.
        max_length: tokens of prompt and answer together, 0: the model's positions.
        prefill_tokens: prompt tokens of one step, so that running answers go on meanwhile.
        cache_bytes: keys and values of all running requests.
    """

    max_running: int = 64
    max_waiting: int = 256
    max_length: int = 0
    prefill_tokens: int = 512
    cache_bytes: int = 2**30


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Counts since the start, and what is there now."""

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


class Engine:
    """One base and its adapters; ``submit`` and ``cancel`` may be called from any thread.

    One thread steps it, with ``run`` or ``step``. ``on_piece`` is called in that thread: it must
    not block and not raise.

    Raises:
        UserError: a model whose cache cannot be shared by requests of unequal length.
    """

    def __init__(
        self, base: BaseModel, adapters: AdapterStore, limits: Limits | None = None
    ) -> None:
        self.base, self.adapters, self.limits = base, adapters, limits or Limits()

    @property
    def max_length(self) -> int:
        """Tokens of prompt and answer together."""
        raise NotImplementedError

    def submit(self, request: Request, on_piece: Callable[[Piece], None]) -> None:
        """Put a request into the queue; its pieces go to ``on_piece``.

        An answer that reaches ``max_length`` ends with "length".

        Raises:
            EngineFull: the queue is at its bound.
            UserError: an unknown adapter, an empty prompt or one that leaves no room for an
                answer, a token id outside the vocabulary, a request id in use.
        """
        raise NotImplementedError

    def cancel(self, request_id: str) -> None:
        """End a request: its place is free at the next step. Unknown ids are ignored."""
        raise NotImplementedError

    def step(self) -> bool:
        """Run one forward pass; False where no request is waiting or running."""
        raise NotImplementedError

    def run(self, stop: threading.Event) -> None:
        """Step until ``stop`` is set, sleeping while there is nothing to do.

        Requests that are left then end with "cancelled".
        """
        raise NotImplementedError

    def stats(self) -> Stats:
        """What a metrics page shows; may be called from any thread."""
        raise NotImplementedError
