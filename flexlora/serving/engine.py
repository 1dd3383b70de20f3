"""Continuous batching: requests for adapters of unequal rank, in one forward pass per step.

Requests join and leave between steps (Orca, OSDI 2022), each with one slot of keys and values;
adapters share the pass as in S-LoRA (arXiv 2311.03285) and Punica (arXiv 2310.18547). A step
computes the next token of every running answer and up to ``prefill_tokens`` tokens of prompts, so a
long prompt delays the answers under way by a bounded time. Requests start in the order of their
submission.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence

from flexlora.errors import UserError, one_line
from flexlora.evaluation.generation import end_ids
from flexlora.serving.adapter_store import AdapterStore
from flexlora.serving.kv_cache import KVCache
from flexlora.serving.limits import Limits, Stats
from flexlora.serving.live_request import LiveRequest
from flexlora.serving.model_checks import length_limit, plain_logits, trial_layers
from flexlora.serving.model_pass import ModelPass, Part
from flexlora.serving.requests import EngineFull, FinishReason, Piece, Request
from flexlora.serving.sampling import logprobs_of, next_tokens
from flexlora.training.base_model import BaseModel

__all__ = ["Engine", "EngineFull", "Limits", "Stats"]

LOG = logging.getLogger(__name__)
REASONS: tuple[FinishReason, ...] = ("stop", "length", "cancelled", "error")


class Engine:
    """One base and its adapters; ``submit`` and ``cancel`` may be called from any thread.

    One thread steps it, with ``run`` or ``step``. ``on_piece`` is called in that thread and must
    not block; a request whose ``on_piece`` raises is cancelled. The model belongs to the engine
    until ``close``: nobody else may call it.

    Raises:
        UserError: a model whose requests cannot be packed (``model_checks.py``).
    """

    def __init__(
        self, base: BaseModel, adapters: AdapterStore, limits: Limits | None = None
    ) -> None:
        self.base, self.adapters, self.limits = base, adapters, limits or Limits()
        longest = length_limit(base)
        self.max_length = min(self.limits.max_length or longest, longest)
        self.ends = frozenset(end_ids(base.model, base.tokenizer))
        expected = plain_logits(base)
        self._pass = ModelPass(base, adapters)
        try:
            layers = trial_layers(base, self._pass, expected)
        except UserError:
            self.close()
            raise
        self._cache = KVCache(
            layers,
            max_length=self.max_length,
            max_bytes=self.limits.cache_bytes,
            device=base.device,
        )
        self._lock = threading.Condition()
        self._waiting: deque[LiveRequest] = deque()
        self._running: list[LiveRequest] = []
        self._known: dict[str, LiveRequest] = {}
        self._counts = dict.fromkeys(("steps", "prompt", "answer", *REASONS), 0)

    def close(self) -> None:
        """Put the model back as it was; the engine is of no use afterwards."""
        self._pass.close()

    def submit(self, request: Request, on_piece: Callable[[Piece], None]) -> None:
        """Put a request into the queue; its pieces go to ``on_piece``.

        An answer that reaches ``max_length`` ends with "length". The adapter is the version that
        its name has now.

        Raises:
            EngineFull: the queue is at its bound.
            UserError: an unknown adapter, an empty prompt or one that leaves no room for an
                answer, a token id outside the vocabulary, a request id in use.
        """
        self._check_prompt(request.prompt_ids)
        version = None if request.adapter is None else self.adapters.newest(request.adapter)
        room = min(request.sampling.max_tokens, self.max_length - len(request.prompt_ids))
        live = LiveRequest(
            request,
            on_piece,
            version=version,
            room=room,
            ends=self.ends.union(request.ends),
            tokenizer=self.base.tokenizer,
        )
        if not self._cache.fits_alone(live.length):
            raise UserError(
                f"a prompt and answer of {live.length} tokens need more than the "
                f"{self.limits.cache_bytes / 2**20:.4g} MiB for keys and values; ask for fewer "
                "max_tokens."
            )
        with self._lock:
            if len(self._waiting) >= self.limits.max_waiting:
                raise EngineFull(f"{len(self._waiting)} requests are waiting; try again later.")
            if request.request_id in self._known:
                raise UserError(f"request id '{request.request_id}' is in use.")
            self._known[request.request_id] = live
            self._waiting.append(live)
            self._lock.notify()

    def _check_prompt(self, prompt: Sequence[int]) -> None:
        if not prompt:
            raise UserError("the prompt is empty, expected at least one token.")
        if len(prompt) >= self.max_length:
            raise UserError(
                f"the prompt has {len(prompt)} tokens and leaves no room for an answer in the "
                f"{self.max_length} that fit; shorten it."
            )
        if min(prompt) < 0 or max(prompt) >= self.base.vocab_size:
            raise UserError(
                f"the prompt has a token id outside the vocabulary of {self.base.vocab_size}."
            )

    def cancel(self, request_id: str) -> None:
        """End a request: its place is free at the next step. Unknown ids are ignored."""
        with self._lock:
            live = self._known.get(request_id)
            if live is not None:
                live.cancelled = True
                self._lock.notify()

    def step(self) -> bool:
        """Run one forward pass; False where no request is waiting or running."""
        self._drop_cancelled()
        self._admit()
        chosen = self._chosen()
        if not chosen:
            return False
        try:
            self._advance(chosen)
        except Exception as error:  # whatever the model's code raises, out of memory among it
            LOG.exception("a step of %d requests failed", len(chosen))
            for live, _ in chosen:
                self._end(live, "error", one_line(error))
        return True

    def run(self, stop: threading.Event) -> None:
        """Step until ``stop`` is set, sleeping while there is nothing to do.

        Requests that are left then end with "cancelled".
        """
        while not stop.is_set():
            if not self.step():
                with self._lock:
                    if not self._waiting:
                        self._lock.wait(timeout=0.1)
        with self._lock:
            left = list(self._known.values())
        for live in left:
            self._end(live, "cancelled")

    def stats(self) -> Stats:
        """What a metrics page shows; may be called from any thread."""
        count, store = self._counts, self.adapters
        return Stats(
            running=len(self._running),
            waiting=len(self._waiting),
            steps=count["steps"],
            prompt_tokens=count["prompt"],
            answer_tokens=count["answer"],
            finished=count["stop"] + count["length"],
            cancelled=count["cancelled"],
            failed=count["error"],
            adapters=len(store.names()),
            adapters_on_device=store.resident,
            adapter_bytes=store.resident_bytes,
            adapter_loads=store.loads,
            adapter_evictions=store.evictions,
            cache_bytes=self._cache.reserved_bytes,
            cache_bytes_used=self._cache.used_bytes,
        )

    def _drop_cancelled(self) -> None:
        with self._lock:
            gone = [live for live in self._known.values() if live.cancelled]
        for live in gone:
            self._end(live, "cancelled")

    def _admit(self) -> None:
        """Give waiting requests their adapter and their slot, in order, while there is room."""
        while len(self._running) < self.limits.max_running:
            with self._lock:
                live = self._waiting[0] if self._waiting else None
            if live is None:
                return
            try:
                if not self._place(live):
                    return
            except Exception as error:  # out of memory
                LOG.exception("request '%s' has no place", live.request.request_id)
                self._end(live, "error", one_line(error))
                continue
            with self._lock:
                self._waiting.popleft()
            self._running.append(live)

    def _place(self, live: LiveRequest) -> bool:
        """Whether there is room for its adapter and for its slot, which it has then."""
        version = live.version
        if version is not None and not self.adapters.load(version):
            return False
        try:
            live.slot = self._cache.take(live.length)
        finally:
            if live.slot is None and version is not None:
                self.adapters.release(version)
        return live.slot is not None

    def _chosen(self) -> list[tuple[LiveRequest, Part]]:
        """The requests of the next step, in the order of the pass, and their tokens."""
        budget, chosen = self.limits.prefill_tokens, list[LiveRequest]()
        parts: list[Part] = []
        for live in self._running:
            assert live.slot is not None
            tokens = live.next_tokens(budget)
            if not live.decoding:
                budget -= len(tokens)
            if tokens:
                chosen.append(live)
                parts.append(Part(tokens=tokens, slot=live.slot, version=live.version))
        return [(chosen[i], parts[i]) for i in self._pass.order(parts)]

    def _advance(self, chosen: Sequence[tuple[LiveRequest, Part]]) -> None:
        """One pass, and the next token of every request whose prompt is through."""
        self._counts["steps"] += 1
        self._counts["prompt"] += sum(len(p.tokens) for live, p in chosen if not live.decoding)
        logits = self._pass.last_logits([part for _, part in chosen])
        ready = [i for i, (live, _) in enumerate(chosen) if live.whole]
        if not ready:
            return
        logits = logits if len(ready) == len(chosen) else logits[ready]
        lives = [chosen[i][0] for i in ready]
        tokens = next_tokens(logits, [live.draw() for live in lives])
        logprobs = logprobs_of(logits, tokens, [x.request.sampling.logprobs for x in lives])
        for live, token, logprob in zip(lives, tokens, logprobs, strict=True):
            if token < 0:
                self._end(live, "error", "the logits are not finite; is the adapter damaged?")
                continue
            self._counts["answer"] += 1
            reason = live.accept(token, logprob)
            if reason is not None:
                self._leave(live, reason)

    def _end(self, live: LiveRequest, reason: FinishReason, error: str = "") -> None:
        """End a request that has not ended by itself."""
        if self._leave(live, reason):
            live.end(reason, error)

    def _leave(self, live: LiveRequest, reason: FinishReason) -> bool:
        """Give back what a request holds; False where it has left before."""
        with self._lock:
            if self._known.get(live.request.request_id) is not live:
                return False
            del self._known[live.request.request_id]
            if live in self._waiting:
                self._waiting.remove(live)
        self._counts[reason] += 1
        if live.slot is not None:
            if reason == "error":
                live.slot.clear()  # a NaN would reach whoever has the slot next
            self._running.remove(live)
            self._cache.free(live.slot)
            if live.version is not None:
                self.adapters.release(live.version)
        return True
