"""A loaded base: the frozen model, its tokenizer, and the sizes that others ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["BaseModel", "text_config"]


def text_config(config: Any) -> Any:
    """The configuration of the language model: of a multimodal one its ``text_config``."""
    inner = getattr(config, "get_text_config", None)
    return inner() if callable(inner) else config


@dataclass(frozen=True, kw_only=True, eq=False)
class BaseModel:
    """A frozen causal language model in evaluation mode, its tokenizer and its fingerprint."""

    name: str
    model: Any
    tokenizer: Any
    fingerprint: str
    device: torch.device

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table: a row of tokens holds ids below this."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def pad_token_id(self) -> int:
        """The tokenizer's padding id where the model has a row for it, else 0; it is masked out."""
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None and 0 <= pad < self.vocab_size else 0

    @property
    def max_positions(self) -> int | None:
        """The longest sequence the model was built for, where its config says so."""
        return getattr(text_config(self.model.config), "max_position_embeddings", None)
