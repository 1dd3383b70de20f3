"""Drawn tokens: the right distribution, by the request's seed alone."""

import math
from collections import Counter

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from flexlora.errors import UserError
from flexlora.serving import sampling
from flexlora.serving.requests import Sampling
from flexlora.serving.sampling import Draw, logprobs_of, next_tokens

VOCAB = 60


def logits_of(rows, seed=0, vocab=VOCAB):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def draw(seed=1, index=0, **options):
    return Draw(sampling=Sampling(**options), seed=seed, index=index)


def expected_probabilities(logits, temperature, top_p):
    """As transformers' own warpers leave them."""
    warped = TemperatureLogitsWarper(temperature)(None, logits[None].double())
    if top_p < 1:
        warped = TopPLogitsWarper(top_p)(None, warped)
    return warped.softmax(dim=-1)[0]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.3, 0.8), (1.0, 0.3)])
def test_tokens_have_the_distribution_of_transformers_warpers(temperature, top_p):
    logits, count = logits_of(1), 4000
    draws = [draw(index=i, temperature=temperature, top_p=top_p) for i in range(count)]
    seen = Counter(next_tokens(logits.expand(count, -1), draws))
    expected = expected_probabilities(logits[0], temperature, top_p)
    assert set(seen) <= set(expected.nonzero().flatten().tolist()), "outside the nucleus"
    for token, probability in enumerate(expected.tolist()):
        spread = math.sqrt(count * probability * (1 - probability))
        assert abs(seen[token] - count * probability) <= 5 * spread + 1e-9, token


def test_a_token_does_not_depend_on_the_rows_beside_it():
    logits = logits_of(40)
    options = [{}, {"temperature": 0.7}, {"temperature": 1.2, "top_p": 0.6}]
    draws = [draw(seed=i, index=3 * i, **options[i % 3]) for i in range(40)]
    together = next_tokens(logits, draws)
    alone = [next_tokens(logits[i : i + 1], [d])[0] for i, d in enumerate(draws)]
    assert together == alone
    assert together[::3] == logits[::3].argmax(dim=-1).tolist(), "without a temperature: greedy"


def test_a_nucleus_of_many_tokens_is_sorted_whole(monkeypatch):
    """A flat distribution: the likeliest few do not reach top-p."""
    logits = logits_of(20, vocab=400) * 0.01
    draws = [draw(seed=i, temperature=1.0, top_p=0.9) for i in range(20)]
    whole = next_tokens(logits, draws)
    monkeypatch.setattr(sampling, "FEW", 8)
    assert next_tokens(logits, draws) == whole
    assert len(set(whole)) > 8


def test_other_seeds_and_places_give_other_tokens():
    logits = logits_of(1).expand(30, -1) * 0.2
    by_index = next_tokens(logits, [draw(index=i, temperature=1.0) for i in range(30)])
    by_seed = next_tokens(logits, [draw(seed=i, temperature=1.0) for i in range(30)])
    assert len(set(by_index)) > 10
    assert len(set(by_seed)) > 10
    assert by_index == next_tokens(logits, [draw(index=i, temperature=1.0) for i in range(30)])


def test_a_row_with_nan_is_named_and_the_others_are_drawn():
    logits = logits_of(4)
    logits[1, 5] = float("nan")
    logits[2, 0] = float("inf")
    logits[3, 0] = -float("inf")
    draws = [draw(temperature=t) for t in (1.0, 0.0, 1.0, 1.0)]
    found = next_tokens(logits, draws)
    assert found[1] == found[2] == -1
    assert found[0] == next_tokens(logits[:1], draws[:1])[0]
    assert found[3] >= 0, "minus infinity is a token that the model never says"


def test_logprobs_are_the_log_softmax_before_temperature():
    logits = logits_of(3)
    first, none, many = logprobs_of(logits, [4, 5, 6], [0, None, 3])
    logs = logits.log_softmax(dim=-1)
    assert none is None
    assert (first.token_id, first.top) == (4, ())
    assert first.logprob == pytest.approx(float(logs[0, 4]), rel=1e-5)
    values, tokens = logs[2].topk(3)
    assert [token for token, _ in many.top] == tokens.tolist()
    assert [value for _, value in many.top] == pytest.approx(values.tolist(), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"max_tokens": 0}, "max_tokens is 0, expected at least 1"),
        ({"max_tokens": -3}, "max_tokens is -3"),
        ({"temperature": -0.1}, "temperature is -0.1, expected 0 to 100"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"seed": 2**64}, "expected a 64-bit number"),
        ({"logprobs": 21}, "logprobs is 21, expected 0 to 20"),
        ({"stop": ("",)}, "stop has a text that is not 1 to 256"),
        ({"stop": ("a",) * 17}, "stop has 17 texts"),
    ],
)
def test_numbers_outside_their_range_are_refused(options, cause):
    with pytest.raises(UserError, match=cause):
        Sampling(**options)
