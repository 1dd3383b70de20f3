"""Text from tokens as they come: whole characters only, and nothing of a stop text.

A character may take several tokens and a stop text may begin in one token and end in another, so
text is held back while it may still change: the end of an incomplete character, and whatever may be
the beginning of a stop text. The pieces, joined, are the text of all tokens up to the stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["AnswerText", "Detokenizer"]

INCOMPLETE = "\ufffd"
WINDOW = 32  # tokens that are decoded at once at most, while they end in whole characters


class Detokenizer:
    """``decode`` of a growing list of tokens, one token at a time.

    A token's text may depend on those before it (SentencePiece's space at the start of a text,
    bytes of one character), so a window is decoded and compared with what it was. ``context`` are
    the tokens before the first. Costs a decode of at most ``WINDOW`` tokens.
    """

    def __init__(self, tokenizer: Any, left_out: set[int], context: Sequence[int] = ()) -> None:
        # The Rust tokenizer itself: transformers' wrapper takes three times as long per token.
        self._core = getattr(tokenizer, "backend_tokenizer", None)
        self.tokenizer, self.left_out = tokenizer, left_out
        self._window = [token for token in context if token not in left_out]
        # Characters of the window's text that were returned; one that the context leaves
        # incomplete is the answer's.
        self._given = len(self._decode(self._window).rstrip(INCOMPLETE))
        self._last: list[int] = []  # tokens since the text last grew

    def add(self, token_id: int) -> str:
        """The characters that ``token_id`` completes."""
        if token_id in self.left_out:
            return ""
        self._window.append(token_id)
        self._last.append(token_id)
        text = self._decode(self._window)
        if len(text) <= self._given or text.endswith(INCOMPLETE):
            return ""
        new = text[self._given :]
        self._given = len(text)
        if len(self._window) >= WINDOW:  # begin anew with the tokens that made this text
            self._window, self._given = self._last, len(self._decode(self._last))
        self._last = []
        return new

    def rest(self) -> str:
        """What is still held back, incomplete characters as the tokenizer writes them."""
        return self._decode(self._window)[self._given :]

    def _decode(self, ids: list[int]) -> str:
        if self._core is not None:
            return self._core.decode(ids, skip_special_tokens=False)
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return self.tokenizer.decode(ids, **options)


class AnswerText:
    """The text of an answer up to the first of ``stops``."""

    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str]) -> None:
        self._detokenizer, self._stops = detokenizer, stops
        self._held = ""
        self.stopped = False

    def add(self, token_id: int) -> str:
        """Text that is certain by now; ``stopped`` afterwards where a stop text is complete."""
        return self._cut(self._detokenizer.add(token_id))

    def finish(self) -> str:
        """The text that was held back, at the end of the answer."""
        text = self._cut(self._detokenizer.rest())
        text, self._held = text + self._held, ""
        return text

    def _cut(self, new: str) -> str:
        if self.stopped:
            return ""
        if not self._stops:
            return new
        held = self._held + new
        found = [at for stop in self._stops if (at := held.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return held[: min(found)]
        kept = self._open(held)
        self._held = held[len(held) - kept :]
        return held[: len(held) - kept]

    def _open(self, text: str) -> int:
        """Characters at the end of ``text`` that may begin a stop text."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                return size
        return 0
