"""One family of generated tasks: an instruction in several wordings, a rule from input to answer.

Train, validation and test are disjoint by construction: SHA-256 of the family's name and the input
decides the split, so no instance can be in two of them, whatever the seeds and the counts.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from flexlora.errors import UserError
from flexlora.seeds import derive_seed

if TYPE_CHECKING:
    from flexlora.data.rows import Row

__all__ = ["Family", "Instance", "draw_rows", "family", "split_of"]

Instance = tuple[str, str]
Half = Literal["known", "held-out"]

# This many rejected draws in a row mean that a family has no more distinct inputs.
_PATIENCE = 2000


@dataclass(frozen=True, kw_only=True)
class Family:
    """``generate(rng)`` draws one ``(input, output)``; ``half`` is whether pretraining has seen it.

    The base was pretrained on ``pretrained_paraphrases`` of known families, with instances of the
    train split only, and on no held-out family.
    """

    name: str
    category: str
    half: Half
    paraphrases: tuple[str, ...]
    generate: Callable[[random.Random], Instance]

    @property
    def pretrained_paraphrases(self) -> tuple[str, ...]:
        """The wordings that the pretraining corpus may use: half of them, or none."""
        return self.paraphrases[: len(self.paraphrases) // 2] if self.half == "known" else ()


def family(
    half: Half, category: str, *paraphrases: str
) -> Callable[[Callable[[random.Random], Instance]], Family]:
    """A decorator: the family that is named after ``generate`` and draws its instances with it."""

    def decorate(generate: Callable[[random.Random], Instance]) -> Family:
        return Family(
            name=generate.__name__,
            category=category,
            half=half,
            paraphrases=paraphrases,
            generate=generate,
        )

    return decorate


def split_of(family: str, text: str) -> str:
    """The one split in which an input of a family may appear: 80 % train, 10 % each other."""
    digest = hashlib.sha256(f"{family}\x1f{text}".encode()).digest()
    bucket = int.from_bytes(digest[:8], "big") % 10
    return {0: "validation", 1: "test"}.get(bucket, "train")


def draw_rows(
    family: Family, *, split: str, count: int, seed: int, client: str | None = None
) -> list[Row]:
    """``count`` rows of one split with distinct inputs, each with a random wording.

    Raises:
        UserError: the split is unknown, or the family has fewer distinct inputs than ``count``.
    """
    from flexlora.data.rows import Row

    if split not in ("train", "validation", "test"):
        raise UserError(f"Split '{split}' is unknown: use 'train', 'validation' or 'test'.")
    rng = random.Random(derive_seed(seed, "tasks", family.name, split, client or ""))
    rows: dict[str, Row] = {}
    misses = 0
    while len(rows) < count:
        text, answer = family.generate(rng)
        if text in rows or split_of(family.name, text) != split:
            misses += 1
            if misses > _PATIENCE:
                raise UserError(
                    f"Task '{family.name}' has only about {len(rows)} distinct {split} inputs, "
                    f"{count} were asked for: ask for fewer."
                )
            continue
        misses = 0
        rows[text] = Row(
            instruction=rng.choice(family.paraphrases),
            input=text,
            output=answer,
            client=client,
            task=family.name,
            category=family.category,
            messages=None,
        )
    return list(rows.values())
