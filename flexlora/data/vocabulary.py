"""Token ids that a model does not embed: the tokenizer grew, the model did not.

Such an id is an index outside the embedding: an IndexError on the CPU, a device assert on CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from flexlora.data.collation import Example
from flexlora.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["check_vocabulary", "max_token_id"]


def max_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The highest id that the tokenizer can write."""
    return max(tokenizer.get_vocab().values(), default=-1)


def check_vocabulary(
    examples: Sequence[Example],
    vocabulary: int,
    tokenizer: PreTrainedTokenizerBase,
    *,
    who: str = "the rows",
) -> None:
    """Refuse examples with ids of ``vocabulary`` and above.

    Raises:
        UserError: naming the tokens.
    """
    outside = {i for example in examples for i in example.input_ids if i >= vocabulary}
    if outside:
        names = ", ".join(repr(tokenizer.convert_ids_to_tokens(i)) for i in sorted(outside)[:3])
        raise UserError(
            f"{who}: the tokenizer writes {names} (id {min(outside)}), but the model embeds ids "
            f"below {vocabulary} only; resize the model's embedding, or take the token out of the "
            "rows or the template."
        )
