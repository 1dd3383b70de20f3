"""The pre-tokenizers that llama.cpp has by name, as ``tokenizer.json`` spells them.

Read from ``src/llama-vocab.cpp``: a GGUF file names its pre-tokenizer (``tokenizer.ggml.pre``)
and llama.cpp splits text by the expressions that it has under that name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["byte_of_letter", "split_name", "split_of"]

# More than one name has the same expressions; the first of each row is written.
GPT_2 = ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling")
DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
QWEN2 = ("qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez")
LLAMA_3 = ("llama-bpe", "llama3", "llama-v3")

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
_SPLITS = {"qwen2": _QWEN2, "llama-bpe": _LLAMA_3}


def split_name(pre_tokenizer: Mapping[str, Any] | None) -> str | None:
    """llama.cpp's name of a byte-level ``pre_tokenizer``; None where it has no equal one."""
    steps = _steps(pre_tokenizer)
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    before, expression = steps[:-1], steps[-1].get("use_regex", True)
    if not before:
        return GPT_2[0] if expression else None
    if len(before) > 1:
        return None
    step = before[0]
    if step["type"] == "Digits":
        return DIGITS[0] if step.get("individual_digits") and expression else None
    if step["type"] != "Split" or expression or step.get("invert"):
        return None
    if step.get("behavior") not in ("Isolated", "isolated"):
        return None
    given = step["pattern"].get("Regex")
    return next((name for name, known in _SPLITS.items() if known == given), None)


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] == "Sequence":
        return list(pre_tokenizer["pretokenizers"])
    return [pre_tokenizer]


def split_of(name: str) -> Any:
    """The ``tokenizers`` pre-tokenizer that llama.cpp has under ``name``; None if not known."""
    from tokenizers import Regex, pre_tokenizers

    if name in GPT_2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in DIGITS:
        first: Any = pre_tokenizers.Digits(individual_digits=True)
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    elif name in (*QWEN2, *LLAMA_3):
        split = _SPLITS["qwen2" if name in QWEN2 else "llama-bpe"]
        first = pre_tokenizers.Split(Regex(split), behavior="isolated")
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    else:
        return None
    return pre_tokenizers.Sequence([first, last])


def byte_of_letter() -> dict[str, int]:
    """The byte behind each letter of GPT-2's byte-level alphabet."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(b): b for b in plain} | {chr(256 + k): b for k, b in enumerate(others)}
