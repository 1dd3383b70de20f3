"""Load the tokenizer of a base; one that is missing, empty or needs code of the folder is refused.

transformers makes an empty tokenizer where a folder names a class and lacks its files: every text
is then no tokens at all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flexlora.errors import UserError

__all__ = ["load_tokenizer"]

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
SAMPLE = "The quick brown fox jumps over 12 lazy dogs, twice."


def load_tokenizer(source: str, name: str, **where: Any) -> Any:
    """The tokenizer of a folder or hub model; ``where`` is handed on to transformers.

    Raises:
        UserError: none there, without its vocabulary, damaged, or one that only code in the folder
            implements.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **where)
        pieces = tokenizer(SAMPLE, add_special_tokens=False).input_ids
    except Exception as error:  # a damaged file may raise any error
        raise UserError(f"the tokenizer of model '{name}' {_cause(source, error)}") from error
    if not pieces or set(pieces) <= {tokenizer.unk_token_id}:
        raise UserError(
            f"the tokenizer of model '{name}' ({type(tokenizer).__name__}) makes no tokens of "
            f"English text; does the folder lack {' or '.join(VOCABULARIES[:3])}?"
        )
    return tokenizer


def _cause(source: str, error: Exception) -> str:
    if "custom code" in str(error):
        return (
            "needs code in the folder (auto_map in tokenizer_config.json), which FlexLoRA never "
            "runs; expected a tokenizer that transformers has."
        )
    folder = Path(source)
    if folder.is_dir() and not any((folder / file).is_file() for file in VOCABULARIES):
        return f"is missing; expected {', '.join(VOCABULARIES[:3])} or another vocabulary there."
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"cannot be loaded: {reason}"
