"""Our attention for narrow heads: the equation itself, every gradient, and where it is not used."""

import pytest
import torch

import reference
from builders import tiny_model
from flexlora.training import attention
from flexlora.training.attention import causal_attention, prefer_narrow, suits
from flexlora.training.models import load_base

IDS = torch.randint(3, 64, (4, 9), generator=torch.Generator().manual_seed(2))
SHAPES = [  # rows, heads, key heads, tokens, head size
    (3, 4, 2, 50, 8),
    (2, 4, 4, 130, 4),
    (5, 6, 2, 33, 3),
    (1, 2, 1, 2, 8),
]


def inputs(rows, heads, key_heads, tokens, size, dtype=torch.float64):
    """Queries, keys, values as a model gives them, ``[rows, heads, T, d]`` views, and dO."""
    maker = torch.Generator().manual_seed(rows * tokens)

    def one(count):
        x = torch.randn(rows, tokens, count, size, generator=maker, dtype=dtype)
        return x.transpose(1, 2).requires_grad_()

    return one(heads), one(key_heads), one(key_heads), one(heads).detach()


def both(function, given, scale):
    query, key, value, gradient = given
    out = function(query, key, value, scale)
    return [out.detach(), *torch.autograd.grad(out, (query, key, value), gradient)]


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_equation_and_so_are_its_gradients(shape):
    given = inputs(*shape)
    wanted = both(reference.causal_attention, given, 0.4)
    for ours, theirs in zip(both(causal_attention, given, 0.4), wanted, strict=True):
        assert reference.relative_error(ours, theirs) < 1e-13
    other = both(reference.causal_attention, given, 0.5)
    assert reference.relative_error(other[0], wanted[0]) > 1e-3, "the scale counts"


def test_probabilities_that_are_made_anew_are_those_that_were_kept(monkeypatch):
    given = inputs(*SHAPES[1], dtype=torch.float32)
    kept = both(causal_attention, given, 0.4)
    monkeypatch.setattr(attention, "KEPT_SCORES", 0)
    for ours, theirs in zip(both(causal_attention, given, 0.4), kept, strict=True):
        assert torch.equal(ours, theirs)


def test_a_few_rows_at_a_time_or_all_at_once(monkeypatch):
    given = inputs(*SHAPES[0])
    whole = both(causal_attention, given, 0.4)
    monkeypatch.setattr(attention, "CHUNK_SCORES", 1)
    for ours, theirs in zip(both(causal_attention, given, 0.4), whole, strict=True):
        assert reference.relative_error(ours, theirs) < 1e-14


def test_nobody_sees_what_comes_later():
    query, key, value, _ = inputs(*SHAPES[0])
    before = causal_attention(query, key, value, 0.4)
    with torch.no_grad():
        key[:, :, 40:] += 3.0
        value[:, :, 40:] -= 2.0
    after = causal_attention(query, key, value, 0.4)
    assert torch.equal(before[:, :, :40], after[:, :, :40])
    assert not torch.equal(before[:, :, 40:], after[:, :, 40:])


def test_what_it_is_for():
    def of(size, tokens=5, keys=5, dtype=torch.float32):
        return suits(torch.zeros(1, 1, tokens, size, dtype=dtype), torch.zeros(1, 1, keys, size))

    assert of(8) and of(4)
    assert not of(9) and not of(64), "torch's own kernel is as fast"
    assert not of(8, tokens=1) and not of(8, tokens=1, keys=1), "a token at a time, with a cache"
    assert not of(8, dtype=torch.bfloat16)


def logits(model, **more):
    with torch.no_grad():
        return model(input_ids=IDS, **more).logits


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "neox", "opt"])
def test_a_model_of_narrow_heads_is_the_same_model(architecture, monkeypatch):
    plain, model, calls = tiny_model(architecture), tiny_model(architecture), []
    own = attention.causal_attention
    monkeypatch.setattr(attention, "causal_attention", lambda *a: calls.append(1) or own(*a))
    assert prefer_narrow(model) and model.config._attn_implementation == attention.NAME
    assert reference.relative_error(logits(model, use_cache=False), logits(plain)) < 1e-12
    assert len(calls) == 2, "once in each of the two layers"

    mask = torch.ones_like(IDS)
    mask[0, :3] = 0  # padding on the left, as in generation: sdpa's own way
    real = mask.bool()
    masked = logits(model, attention_mask=mask)[real]
    assert reference.relative_error(masked, logits(plain, attention_mask=mask)[real]) < 1e-12
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    generated = [m.generate(input_ids=IDS, **options) for m in (model, plain)]
    assert torch.equal(*generated) and len(calls) == 2


def test_wide_heads_and_what_was_asked_for_stay_as_they_are():
    assert load_base("embedded", device="cpu").model.config._attn_implementation == "sdpa"
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    assert not prefer_narrow(model) and model.config._attn_implementation == "eager"
