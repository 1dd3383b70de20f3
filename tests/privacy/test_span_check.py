"""DAGER's span check on updates whose gradient is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flexlora.lora.adapters import Adapter, LoRAFactors
from flexlora.privacy.span_check import (
    TOLERANCE,
    factor_space_distances,
    input_space_distances,
)

IN, OUT, VOCABULARY = 24, 16, 60
PRESENT = [3, 11, 17, 40, 58]
NAMES = ("q", "k", "v")


@pytest.fixture
def tokens():
    draw = torch.Generator().manual_seed(0)
    return torch.randn(VOCABULARY, IN, generator=draw)


def sent(rank):
    draw = torch.Generator().manual_seed(1)
    factors = {
        name: LoRAFactors(
            lora_A=torch.randn(rank, IN, generator=draw),
            lora_B=torch.zeros(OUT, rank),
            alpha=8.0,
        )
        for name in NAMES
    }
    return Adapter(factors)


def gradient(tokens, name):
    """``sum_t g_t x_t'`` over the tokens that were there, ``[out, in]``."""
    draw = torch.Generator().manual_seed(len(name) + ord(name))
    return torch.randn(OUT, len(PRESENT), generator=draw) @ tokens[PRESENT]


def changed(start, **new):
    """``start`` with what the functions in ``new`` make of each module's factors."""
    made = {
        name: replace(f, **{label: make(name, f) for label, make in new.items()})
        for name, f in start.items()
    }
    return Adapter(made)


def recovered(distances):
    return (distances <= TOLERANCE).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("rank", [5, 8])
def test_aligned_rows_show_every_token_once_the_rank_is_enough(tokens, rank):
    start = sent(rank)

    def aligned(name, factors):
        top = torch.linalg.svd(gradient(tokens, name))[2][: len(PRESENT)]
        return torch.cat([top, factors.lora_A[len(PRESENT) :]])  # the rest as it was sent

    upload = changed(start, lora_A=aligned)
    inputs = dict.fromkeys(NAMES, tokens)
    distances, dimension = input_space_distances(start.to(), upload, inputs, replaced=True)
    assert recovered(distances) == PRESENT and dimension == len(PRESENT)


def test_three_modules_of_a_low_rank_show_together_what_one_does_not(tokens):
    start = sent(2)
    upload = changed(start, lora_A=lambda name, f: torch.linalg.svd(gradient(tokens, name))[2][:2])
    one, _ = input_space_distances(start, upload, {"q": tokens}, replaced=True)
    three, dimension = input_space_distances(
        start, upload, dict.fromkeys(NAMES, tokens), replaced=True
    )
    assert recovered(one) == [] and (recovered(three), dimension) == (PRESENT, 5)


def test_the_change_of_rows_by_a_gradient_step_shows_them(tokens):
    start, mix = sent(8), torch.Generator().manual_seed(7)
    upload = changed(
        start,
        lora_A=lambda name, f: (
            f.lora_A - 0.1 * torch.randn(8, OUT, generator=mix) @ gradient(tokens, name)
        ),
    )
    distances, _ = input_space_distances(
        start, upload, dict.fromkeys(NAMES, tokens), replaced=False
    )
    assert recovered(distances) == PRESENT
    # Steps of Adam are the signs of it: another space, of full dimension.
    signs = changed(
        start, lora_A=lambda name, f: f.lora_A - 0.1 * (upload[name].lora_A - f.lora_A).sign()
    )
    distances, dimension = input_space_distances(
        start, signs, dict.fromkeys(NAMES, tokens), replaced=False
    )
    assert recovered(distances) != PRESENT or dimension == IN


def test_columns_alone_show_tokens_only_below_the_rank(tokens):
    inputs = dict.fromkeys(NAMES, tokens)
    for rank, expected in ((8, PRESENT), (4, list(range(VOCABULARY)))):
        start = sent(rank)
        upload = changed(start, lora_B=lambda name, f: gradient(tokens, name) @ f.lora_A.mT)
        distances, dimension = factor_space_distances(start, upload, inputs)
        assert recovered(distances) == expected and dimension == min(rank, len(PRESENT))


def test_rows_as_they_were_sent_show_nothing(tokens):
    start = sent(4)
    distances, dimension = input_space_distances(
        start, start, dict.fromkeys(NAMES, tokens), replaced=True
    )
    assert dimension == 0 and torch.equal(distances, torch.ones(VOCABULARY).double())
