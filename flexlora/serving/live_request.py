"""One request between its submission and its end: what is computed, said and reserved for it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from flexlora.evaluation.generation import outside_text
from flexlora.seeds import secret_seed
from flexlora.serving.adapter_store import Version
from flexlora.serving.answer_text import AnswerText, Detokenizer
from flexlora.serving.kv_cache import Slot
from flexlora.serving.requests import FinishReason, Piece, Request, TokenLogprob
from flexlora.serving.sampling import Draw

__all__ = ["LiveRequest"]

LOG = logging.getLogger(__name__)
CONTEXT = 8  # tokens of the prompt before the answer: a character has up to four


class LiveRequest:
    """A request with its adapter's version, its slot and the tokens so far.

    ``room`` is how many tokens the answer can have; ``ends`` are the ids that end it.
    """

    def __init__(
        self,
        request: Request,
        on_piece: Callable[[Piece], None],
        *,
        version: Version | None,
        room: int,
        ends: frozenset[int],
        tokenizer: Any,
    ) -> None:
        self.request, self.on_piece, self.version = request, on_piece, version
        self.room, self.ends = room, ends
        self.slot: Slot | None = None
        self.cancelled = False
        sampling = request.sampling
        self.seed = secret_seed() if sampling.seed is None else sampling.seed
        self.answer: list[int] = []
        detokenizer = Detokenizer(tokenizer, outside_text(tokenizer), request.prompt_ids[-CONTEXT:])
        self._text = AnswerText(detokenizer, sampling.stop)

    @property
    def length(self) -> int:
        """Tokens that are in the slot when the answer has all the tokens it can have."""
        return len(self.request.prompt_ids) + self.room

    def next_tokens(self, limit: int) -> Sequence[int]:
        """What to compute next: the newest token, or up to ``limit`` of the prompt."""
        assert self.slot is not None
        if self.answer:
            return self.answer[-1:]
        return self.request.prompt_ids[self.slot.length : self.slot.length + limit]

    @property
    def decoding(self) -> bool:
        return bool(self.answer)

    @property
    def whole(self) -> bool:
        """Whether the prompt is in the slot, so that the last token's logits are the next's."""
        assert self.slot is not None
        return self.slot.length >= len(self.request.prompt_ids)

    def draw(self) -> Draw:
        """How the next token is drawn."""
        return Draw(sampling=self.request.sampling, seed=self.seed, index=len(self.answer))

    def accept(self, token_id: int, logprob: TokenLogprob | None) -> FinishReason | None:
        """Say the next token; the reason where the answer ends with it."""
        self.answer.append(token_id)
        reason: FinishReason | None = "stop" if token_id in self.ends else None
        text = "" if reason else self._text.add(token_id)
        if self._text.stopped:
            reason = "stop"
        elif reason is None and len(self.answer) >= self.room:
            reason = "length"
        if reason is not None:
            text += self._text.finish()
            reason = "stop" if self._text.stopped else reason
        logprobs = () if logprob is None else (logprob,)
        self._say(Piece(text=text, token_ids=(token_id,), logprobs=logprobs, finish_reason=reason))
        return reason

    def end(self, reason: FinishReason, error: str = "") -> None:
        """Say the text that is held back, and why there is no more."""
        self._say(Piece(text=self._text.finish(), finish_reason=reason, error=error))

    def _say(self, piece: Piece) -> None:
        """A callback that raises has no reader: the request is cancelled, the others go on."""
        try:
            self.on_piece(piece)
        except Exception:
            LOG.exception("request '%s' is cancelled: its reader failed", self.request.request_id)
            self.cancelled = True
