"""One forward pass over parts of many requests, through transformers' own model code.

The parts are packed into one row ``[1, N]`` in the order in which ``block_plan.py`` needs them:
newest tokens first, then parts of prompts, each by the arena rows of their adapters.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexlora.serving.adapter_store import AdapterStore, Version
from flexlora.serving.attention import NAME, attention_of, running
from flexlora.serving.attention_plan import AttentionPass, Span, plan_attention
from flexlora.serving.block_plan import Block, BlockCosts, Segment, plan_blocks
from flexlora.serving.kv_cache import Slot
from flexlora.serving.served_layers import ServedModel
from flexlora.training.base_model import BaseModel

__all__ = ["ModelPass", "Part"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """``tokens`` of a request after the ``slot.length`` that are in its slot."""

    tokens: Sequence[int]
    slot: Slot
    version: Version | None


class ModelPass:
    """The base's model with served linears and attention, until ``close``."""

    def __init__(self, base: BaseModel, store: AdapterStore) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(NAME, attention_of)
        self.model, self.device, self.store = base.model, base.device, store
        self.served = ServedModel(base.model, store.arena)
        self._attention = base.model.config._attn_implementation
        base.model.config._attn_implementation = NAME
        self._costs = BlockCosts.of(list(store.arena.shapes.values()), base.device)
        self._planned: tuple[Segment, ...] = ()
        self._blocks: list[Block] = []
        parameters = inspect.signature(base.model.forward).parameters
        self._keeps_logits = "logits_to_keep" in parameters
        self._takes_positions = "position_ids" in parameters

    def close(self) -> None:
        """Put the model back as it was."""
        self.served.remove()
        self.model.config._attn_implementation = self._attention

    def order(self, parts: Sequence[Part]) -> list[int]:
        """Indices of ``parts`` as they are packed."""
        return sorted(range(len(parts)), key=lambda i: self._place(parts[i]))

    def _place(self, part: Part) -> tuple[bool, int]:
        decoding = part.slot.length > 0 and len(part.tokens) == 1
        return not decoding, -1 if part.version is None else self.store.rows(part.version).start

    def last_logits(self, parts: Sequence[Part]) -> Tensor:
        """Logits ``[parts, vocabulary]`` after the last token of each part, in float32.

        ``parts`` are in ``order``. Their tokens are in their slots afterwards.
        """
        spans = _spans(parts)
        step = plan_attention(spans, self.device)
        self._plan_blocks(parts, spans)
        ends = [span.start + span.count - 1 for span in spans]
        logits = self.forward(parts, spans, step, ends)
        for span in spans:
            span.slot.length += span.count
        return logits.float()

    @torch.no_grad()
    def forward(
        self, parts: Sequence[Part], spans: Sequence[Span], step: AttentionPass, ends: list[int]
    ) -> Tensor:
        """Logits at the positions ``ends`` of the step."""
        tokens = [token for part in parts for token in part.tokens]
        positions = [p for s in spans for p in range(s.past, s.past + s.count)]
        both = torch.tensor([tokens, positions], device=self.device)
        options: dict[str, Any] = {"position_ids": both[1:]} if self._takes_positions else {}
        index = torch.tensor(ends, device=self.device)
        whole = len(ends) == len(tokens)
        if self._keeps_logits and not whole:
            options["logits_to_keep"] = index
        with running(step):
            found = self.model(input_ids=both[:1], use_cache=False, **options).logits[0]
        return found if whole or self._keeps_logits else found[index]

    def plan_base(self) -> None:
        """The next pass is of the base alone."""
        self.served.plan([], 0)

    def _plan_blocks(self, parts: Sequence[Part], spans: Sequence[Span]) -> None:
        """The blocks of this step, or those of the last where nothing has changed."""
        segments = tuple(_segments(parts, spans, self.store))
        if segments != self._planned:
            self._blocks = plan_blocks(segments, self._costs, self.device)
            self._planned = segments
        self.served.plan(self._blocks, spans[-1].start + spans[-1].count)


def _spans(parts: Sequence[Part]) -> list[Span]:
    spans, at = [], 0
    for part in parts:
        count = len(part.tokens)
        spans.append(Span(start=at, count=count, past=part.slot.length, slot=part.slot))
        at += count
    return spans


def _segments(parts: Sequence[Part], spans: Sequence[Span], store: AdapterStore) -> list[Segment]:
    """Neighbours of one adapter together; the base's own tokens are in none."""
    found: list[Segment] = []
    for part, span in zip(parts, spans, strict=True):
        if part.version is None:
            continue
        rows, stop = store.rows(part.version), span.start + span.count
        start = span.start
        if found and found[-1].rows == rows and found[-1].stop == start:
            start = found.pop().start
        found.append(Segment(start=start, stop=stop, rows=rows))
    return found
