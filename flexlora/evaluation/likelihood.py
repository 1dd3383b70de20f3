"""The loss of each row's answer, and the choice of a multiple-choice row that is most likely.

    acc        argmax over choices c of  log p(c | prompt)
    acc_norm   argmax over choices c of  log p(c | prompt) / characters of c

as lm-evaluation-harness computes them (Gao et al. 2021): the token that ends an answer is no part
of a choice. It is part of the loss, and so of bits per byte, in which it closes the answer's code:

    bits per byte = sum over answer tokens and the end of -log2 p / UTF-8 bytes of the answer

That number compares models of unequal tokenizers on the same text; a loss per token does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flexlora.data.collation import Example, collate
from flexlora.evaluation.generation import passes
from flexlora.training.local import answer_losses
from flexlora.training.slots import SlotModel
from flexlora.wire.jobs import Score

__all__ = ["answer_token_losses", "likelihood_score"]


@torch.no_grad()
def answer_token_losses(
    slots: SlotModel,
    examples: Sequence[Sequence[Example]],
    *,
    batch_size: int,
    pad_token_id: int,
    go_on: Callable[[], None] = lambda: None,
) -> list[list[Tensor]]:
    """Losses ``[answer tokens]`` of each row ``examples[k]`` under slot k, float64, in nats.

    ``go_on`` is called before every pass and may raise.
    """
    found = [[torch.empty(0)] * len(rows) for rows in examples]
    lengths = [[len(row.input_ids) for row in rows] for rows in examples]
    for indices in passes(lengths, batch_size):
        go_on()
        rows = [[examples[k][i] for i in chosen] for k, chosen in enumerate(indices)]
        parts = answer_losses(slots, collate(rows, pad_token_id=pad_token_id))
        for k, part in enumerate(parts):
            counts = [row.answer_tokens for row in rows[k]]
            for i, losses in zip(indices[k], part.double().cpu().split(counts), strict=True):
                found[k][i] = losses
    return found


def likelihood_score(row: Example, losses: Sequence[Tensor]) -> Score:
    """The score of a row from the token losses of its answer, or of each of its choices."""
    right = row.right_choice if row.choices else 0
    score = Score(
        loss=float(losses[right].sum()),
        tokens=row.answer_tokens,
        rows=1,
        answer_bytes=len(row.answer.encode()),
    )
    if not row.choices:
        return score
    sums = [
        -float(of_choice[: len(of_choice) - len(choice.ends)].sum())
        for of_choice, choice in zip(losses, row.choices, strict=True)
    ]
    norms = [s / len(choice.answer) for s, choice in zip(sums, row.choices, strict=True)]
    return score + Score(
        choice_rows=1,
        correct=float(sums.index(max(sums)) == right),
        correct_norm=float(norms.index(max(norms)) == right),
    )
