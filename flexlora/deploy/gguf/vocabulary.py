"""A fast tokenizer as the vocabulary of a GGUF file, or a refusal.

llama.cpp has the pre-tokenizers of published models built in and knows them by name, so a
tokenizer is written if its parts are exactly those of one that llama.cpp has:

    gpt2    byte-level BPE whose pre-tokenizer is in ``config/gguf_splits.py``
    llama   sentencepiece BPE with byte fallback; llama.cpp merges the pair of the highest score,
            so that the scores are the places in the list of merges
    rwkv    longest match from left to right over a byte-level vocabulary without merges (the
            embedded base's WordPiece)

llama.cpp normalizes no text: Unicode NFC of a tokenizer is left out, as llama.cpp's converter does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flexlora.config.gguf_package import gguf_package
from flexlora.config.gguf_splits import byte_of_letter, split_name
from flexlora.errors import UserError

__all__ = ["Vocabulary", "read_vocabulary"]

NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE, UNKNOWN = 1, 3, 4, 5, 6, 2
LLAMA_3 = ("llama-bpe",)  # llama.cpp looks a whole word up before it merges
SPACE = "\u2581"
WORD = re.compile("Ġ[A-Za-z]+|[A-Z][A-Za-z]*")
UNMERGED = -1e6  # the score of a token that no merge makes


@dataclass(kw_only=True)
class Vocabulary:
    """Tokens by id, their kinds, and the settings that llama.cpp reads beside them."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    special: dict[str, int] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)
    chat_template: str = ""

    def add_to(self, writer: Any) -> None:
        """Write everything as ``tokenizer.*``."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        if self.scores:
            writer.add_token_scores(self.scores)
        for name, token_id in self.special.items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token_id)
        for name, value in self.flags.items():
            writer.add_bool(f"tokenizer.ggml.{name}", value)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(tokenizer: Any, rows: int) -> Vocabulary:
    """The vocabulary of a transformers tokenizer for a model of ``rows`` embeddings.

    Raises:
        UserError: a tokenizer that llama.cpp would not repeat, or more tokens than rows.
    """
    gguf_package()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(_refusal(f"is a {type(tokenizer).__name__} without a tokenizer.json"))
    parts = json.loads(backend.to_str())
    model = parts["model"]
    tokens, types = _tokens(parts, backend.get_vocab(with_added_tokens=True), rows)
    found = Vocabulary(model="", pre="default", tokens=tokens, types=types)
    if model["type"] == "BPE" and model.get("byte_fallback"):
        _sentencepiece(found, parts)
    elif model["type"] == "BPE":
        _byte_level(found, parts)
    elif model["type"] == "WordPiece":
        _longest_match(found, parts)
    else:
        raise UserError(_refusal(f"is a {model['type']} model"))
    found.special = _special(tokenizer)
    found.flags |= _added_around(tokenizer)
    template = getattr(tokenizer, "chat_template", None)
    found.chat_template = template if isinstance(template, str) else ""
    return found


def _refusal(cause: str) -> str:
    return (
        f"the tokenizer of the base {cause}, which llama.cpp would not split as transformers does; "
        "use --format gguf-lora beside a GGUF file of the base from its publisher."
    )


def _tokens(
    parts: Mapping[str, Any], ids: Mapping[str, int], rows: int
) -> tuple[list[str], list[int]]:
    """Texts and kinds by id; ids without a token, up to ``rows``, are unused."""
    if (top := max(ids.values())) >= rows:
        raise UserError(f"the tokenizer has an id {top}, and the base {rows} embeddings.")
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    for text, token_id in ids.items():
        tokens[token_id], types[token_id] = text, NORMAL
    for added in parts["added_tokens"]:
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    return tokens, types


def _byte_level(found: Vocabulary, parts: Mapping[str, Any]) -> None:
    model, normalizer = parts["model"], parts.get("normalizer")
    pre = split_name(parts.get("pre_tokenizer"))
    if pre is None:
        raise UserError(_refusal("has a pre-tokenizer"))
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise UserError(_refusal(f"has the normalizer {normalizer.get('type')}"))
    if bool(model.get("ignore_merges")) != (pre in LLAMA_3):
        raise UserError(_refusal(f"has ignore_merges={bool(model.get('ignore_merges'))}"))
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise UserError(_refusal("marks the inside or the end of words"))
    found.model, found.pre = "gpt2", pre
    found.merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]


def _sentencepiece(found: Vocabulary, parts: Mapping[str, Any]) -> None:
    prefix = _space_prefix(parts)
    if prefix is None:
        raise UserError(_refusal("marks spaces"))
    scores: dict[str, float] = {}
    for place, merge in enumerate(parts["model"]["merges"]):
        made = merge.replace(" ", "") if isinstance(merge, str) else "".join(merge)
        scores.setdefault(made, -float(place))
    found.model, found.flags = "llama", {"add_space_prefix": prefix}
    found.scores = [scores.get(token, UNMERGED) for token in found.tokens]
    unknown = parts["model"].get("unk_token")
    for token_id, token in enumerate(found.tokens):
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            found.types[token_id] = BYTE
        elif token == unknown:
            found.types[token_id] = UNKNOWN
        elif found.types[token_id] == USER_DEFINED:
            found.tokens[token_id] = token.replace(SPACE, " ")


def _space_prefix(parts: Mapping[str, Any]) -> bool | None:
    """Whether a space is put before the text; None where spaces are marked in another way."""
    normalizer, pre = parts.get("normalizer"), parts.get("pre_tokenizer")
    if normalizer is None and pre is not None and pre.get("type") == "Metaspace":
        known = {"first": True, "never": False}
        plain = pre.get("replacement") == SPACE and not pre.get("split", True)
        return known.get(pre.get("prepend_scheme")) if plain else None
    if pre is not None or normalizer is None:
        return None
    steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if steps[-1] != replaced:
        return None
    return {(): False, ("Prepend",): True}.get(tuple(step["type"] for step in steps[:-1]))


def _longest_match(found: Vocabulary, parts: Mapping[str, Any]) -> None:
    """WordPiece takes the longest token within a word, llama.cpp's ``rwkv`` within the whole text.

    Equal where no token crosses the edge of a word of GPT-2's expression: every token is one byte
    or ASCII letters, with a space before them or else a capital first, since a small letter may
    belong to a contraction (``'table`` is ``'t`` and ``able``).
    """
    model, bytes_of = parts["model"], byte_of_letter()
    if split_name(parts.get("pre_tokenizer")) != "gpt-2" or parts.get("normalizer") is not None:
        raise UserError(_refusal("is a WordPiece over other words than GPT-2's"))
    normal = [i for i, kind in enumerate(found.types) if kind == NORMAL]
    texts = {found.tokens[i] for i in normal}
    crossing = any(len(text) > 1 and not WORD.fullmatch(text) for text in texts)
    if model["continuing_subword_prefix"] or crossing or not set(bytes_of) <= texts:
        raise UserError(_refusal("is a WordPiece whose tokens cross words or lack bytes"))
    found.model = "rwkv"
    for token_id, kind in enumerate(found.types):
        text = found.tokens[token_id]
        raw = bytes(bytes_of[c] for c in text) if kind == NORMAL else text.encode()
        found.tokens[token_id] = _escaped(raw)


def _escaped(raw: bytes) -> str:
    """ASCII with ``\\xNN`` for the rest, as llama.cpp reads the tokens of ``rwkv``."""
    plain = (chr(byte) if 32 <= byte < 127 and byte != 92 else f"\\x{byte:02x}" for byte in raw)
    return "".join(plain)


def _special(tokenizer: Any) -> dict[str, int]:
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    found = {name: getattr(tokenizer, f"{short}_token_id") for name, short in names.items()}
    return {name: int(token_id) for name, token_id in found.items() if token_id is not None}


def _added_around(tokenizer: Any) -> dict[str, bool]:
    """Whether the tokenizer puts bos before and eos after a text."""
    ids = tokenizer("a").input_ids
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return {
        "add_bos_token": bos is not None and ids[0] == bos,
        "add_eos_token": eos is not None and ids[-1] == eos,
    }
