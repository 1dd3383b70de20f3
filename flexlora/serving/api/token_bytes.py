"""The bytes of single tokens, which log-probabilities name: a token may be part of a character."""

from __future__ import annotations

import json
import re
from functools import cached_property
from typing import Any

__all__ = ["TokenBytes"]

BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's byte fallback
WORD_MARK = "\u2581"


def _byte_alphabet() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for (GPT-2, Radford et al. 2019).

    Printing bytes of Latin-1 stand for themselves; the others are the letters from U+0100 on.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {chr(byte): byte for byte in plain}
    return letters | {chr(0x100 + i): byte for i, byte in enumerate(others)}


class TokenBytes:
    """The bytes of each token of a vocabulary; those of an answer, joined, are its text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        core = getattr(tokenizer, "backend_tokenizer", None)
        decoder = json.loads(core.to_str()).get("decoder") if core is not None else None
        kinds = re.findall(r'"type": "(\w+)"', json.dumps(decoder))
        self._letters = _byte_alphabet() if "ByteLevel" in kinds else {}
        self._fallback = "ByteFallback" in kinds

    @cached_property
    def _tokens(self) -> dict[int, str]:
        return {token_id: token for token, token_id in self._tokenizer.get_vocab().items()}

    @cached_property
    def _added(self) -> dict[int, str]:
        return {i: token.content for i, token in self._tokenizer.added_tokens_decoder.items()}

    def __call__(self, token_id: int) -> bytes:
        """Empty for an id without a token."""
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._tokens.get(token_id, "")
        if self._letters and all(letter in self._letters for letter in token):
            return bytes(self._letters[letter] for letter in token)
        found = BYTE.fullmatch(token) if self._fallback else None
        return bytes([int(found[1], 16)]) if found else token.replace(WORD_MARK, " ").encode()
