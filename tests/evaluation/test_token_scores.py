"""Log-probabilities and Min-K%++ of answers, against a slow loop over the vocabulary."""

from __future__ import annotations

import math

import pytest
import torch

from builders import tiny_model
from flexlora.data.collation import Example
from flexlora.evaluation.token_scores import row_scores
from flexlora.training.slots import SlotModel


def row(ids, prompt_length):
    return Example(input_ids=tuple(ids), prompt_length=prompt_length, prompt="", answer="")


@pytest.fixture(scope="module")
def slots():
    return SlotModel(tiny_model("llama"))


def slow(slots, example):
    """Min-K%++ at K = 20 by its definition, and the mean log-probability."""
    with torch.no_grad():
        logits = slots.model(input_ids=torch.tensor([example.input_ids])).logits[0].double()
    chosen, z = [], []
    for at in range(example.prompt_length, len(example.input_ids)):
        p = logits[at - 1].softmax(0).tolist()
        mean = sum(q * math.log(q) for q in p)
        deviation = math.sqrt(sum(q * (math.log(q) - mean) ** 2 for q in p))
        chosen.append(math.log(p[example.input_ids[at]]))
        z.append((chosen[-1] - mean) / deviation)
    lowest = sorted(z)[: math.ceil(0.2 * len(z))]
    return sum(chosen) / len(chosen), sum(lowest) / len(lowest)


def test_scores_are_their_definitions_in_the_order_of_the_rows(slots):
    rows = [row([5, 9, 3, 7, 2, 8, 4, 6, 1], 2), row([4, 4, 9], 1), row([8, 1, 2, 3, 9, 9], 3)]
    means, lowest = row_scores(slots, rows, batch_size=2, pad_token_id=0)
    expected = [slow(slots, example) for example in rows]
    assert means == pytest.approx([mean for mean, _ in expected], rel=1e-6)
    assert lowest == pytest.approx([least for _, least in expected], rel=1e-5)
