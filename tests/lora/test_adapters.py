"""Factors and adapters: scaling where ranks and alphas differ, and what is refused."""

import math

import pytest
import torch

import reference
from builders import random_adapter, random_factors
from flexlora import Adapter, LoRAFactors
from flexlora.lora.adapters import zero_factors


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("alpha", [1.0, 16.0, 7.5])
@pytest.mark.parametrize("rslora", [False, True])
def test_scaling_follows_alpha_and_rank_never_a_constant(rank, alpha, rslora):
    """Trap T1: alpha/rank ignored, or hard-coded as 16/rank."""
    factors = random_factors(6, 9, rank, alpha=alpha, rslora=rslora)
    expected = alpha / math.sqrt(rank) if rslora else alpha / rank
    assert factors.scaling == expected
    dense = expected * (factors.lora_B @ factors.lora_A)
    torch.testing.assert_close(factors.delta_weight(), dense, rtol=1e-15, atol=1e-15)
    assert reference.relative_error(factors.delta_weight(), reference.delta_weight(factors)) < 1e-15


def test_sides_are_told_by_name_not_by_size():
    factors = random_factors(6, 9, 4)
    assert (factors.out_features, factors.in_features, factors.rank) == (6, 9, 4)
    square = random_factors(4, 4, 4)
    assert torch.equal(square.delta_weight(), 4.0 * (square.lora_B @ square.lora_A))


@pytest.mark.parametrize(
    ("A", "B", "alpha", "message"),
    [
        ((4, 9), (6, 3), 1.0, r"lora_A has shape \(4, 9\) and lora_B \(6, 3\).*exchanged"),
        ((9, 4), (4, 6), 1.0, r"lora_A has shape \(9, 4\)"),
        ((4,), (6, 4), 1.0, r"lora_A has shape \(4,\)"),
        ((0, 9), (6, 0), 1.0, "the rank is 0, expected at least 1"),
        ((4, 9), (6, 4), 0.0, "alpha is 0.0, expected a positive number"),
        ((4, 9), (6, 4), -1.0, "alpha is -1.0, expected a positive number"),
        ((4, 9), (6, 4), math.nan, "alpha is nan, expected a positive number"),
        ((4, 9), (6, 4), math.inf, "alpha is inf, expected a positive number"),
    ],
)
def test_factors_that_do_not_pair_up_are_refused(A, B, alpha, message):
    with pytest.raises(ValueError, match=message):
        LoRAFactors(lora_A=torch.zeros(A), lora_B=torch.zeros(B), alpha=alpha)


def test_an_adapter_needs_modules_that_are_factors():
    with pytest.raises(ValueError, match="at least one module, got none"):
        Adapter({})
    with pytest.raises(ValueError, match="module 'q' is a Tensor, expected LoRAFactors"):
        Adapter({"q": torch.zeros(2, 2)})


def test_an_unknown_module_names_the_nearest(shapes):
    adapter = random_adapter(shapes)
    with pytest.raises(KeyError, match=r"no module 'attn.qq'.*Did you mean 'attn.q'"):
        adapter["attn.qq"]
    assert "attn.qq" not in adapter and "attn.q" in adapter


def test_modules_are_in_the_order_of_their_names(shapes):
    forward, backward = random_adapter(shapes), random_adapter(dict(reversed(shapes.items())))
    assert list(forward) == sorted(shapes)
    assert forward.digest() == backward.digest()


def test_digest_is_equal_only_for_the_same_adapter(shapes):
    adapter = random_adapter(shapes)
    assert adapter.digest() == adapter.map(torch.clone).digest()
    one_bit = adapter.map(torch.clone)
    one_bit["attn.q"].lora_A[0, 0] += 1e-15
    other = {
        "a bit": one_bit,
        "alpha": random_adapter(shapes, alpha=17.0),
        "rslora": random_adapter(shapes, rslora=True),
        "dtype": adapter.to(torch.float32),
        "a module less": Adapter({n: f for n, f in adapter.items() if n != "attn.q"}),
        "a name": Adapter({n.replace("q", "k"): f for n, f in adapter.items()}),
    }
    digests = {name: changed.digest() for name, changed in other.items()}
    assert adapter.digest() not in digests.values()
    assert len(set(digests.values())) == len(other), digests


def test_digest_reads_the_values_of_a_strided_tensor(shapes):
    adapter = random_adapter(shapes)
    strided = adapter.map(lambda tensor: tensor.T.contiguous().T)
    assert not strided["mlp.up"].lora_B.is_contiguous()
    assert strided.digest() == adapter.digest()


def test_num_bytes_counts_what_is_held(shapes):
    adapter = random_adapter(shapes, rank=[2, 4, 3])
    numbers = 2 * (12 + 12) + 4 * (6 + 12) + 3 * (20 + 12)
    assert adapter.num_bytes == 8 * numbers
    assert adapter.to(torch.bfloat16).num_bytes == 2 * numbers
    assert adapter.to(torch.bfloat16)["attn.q"].alpha == 16.0


@pytest.mark.parametrize("rslora", [False, True])
def test_terms_are_rank_one_parts_that_keep_their_weight(rslora):
    """Every split of the terms adds up to the whole, whatever the scaling of its new rank."""
    factors = random_factors(6, 9, 5, alpha=7.5, rslora=rslora)
    whole = reference.delta_weight(factors)
    for chosen in ([0], [1, 3], [4, 2, 0], range(5)):
        rest = [term for term in range(5) if term not in set(chosen)]
        parts = [factors.terms(part) for part in (chosen, rest) if len(list(part))]
        assert parts[0].rank == len(list(chosen)) and parts[0].rslora == rslora
        assert parts[0].scaling == pytest.approx(factors.scaling, rel=1e-15)
        total = sum(reference.delta_weight(part) for part in parts)
        assert reference.relative_error(total, whole) < 1e-15
    assert torch.equal(factors.terms([4, 2]).lora_A, factors.lora_A[[4, 2]])
    assert torch.equal(factors.terms([4, 2]).lora_B, factors.lora_B[:, [4, 2]])


@pytest.mark.parametrize("alphas", [(8.0, 12.0, 4.0), (3.0, 20.0, 5.0)])
@pytest.mark.parametrize("rslora", [False, True])
def test_factors_side_by_side_are_the_sum_of_the_products(alphas, rslora):
    """At one scaling the factors stay as they are; at several it moves into ``lora_B``."""
    ranks = (2, 3, 1)
    parts = [
        random_factors(6, 9, rank, alpha=alpha, rslora=rslora, seed=rank)
        for rank, alpha in zip(ranks, alphas, strict=True)
    ]
    whole = LoRAFactors.side_by_side(parts)
    total = sum(reference.delta_weight(part) for part in parts)
    assert whole.rank == 6
    assert reference.relative_error(reference.delta_weight(whole), total) < 1e-15
    assert torch.equal(whole.lora_A, torch.cat([part.lora_A for part in parts]))
    if len({part.scaling for part in parts}) == 1:
        assert whole.scaling == pytest.approx(parts[0].scaling, rel=1e-15)
        assert torch.equal(whole.lora_B, torch.cat([part.lora_B for part in parts], dim=1))
    else:
        assert whole.scaling == 1.0


def test_zero_factors_add_nothing_and_have_the_shape_that_is_asked():
    like = random_factors(6, 9, 5)
    nothing = zero_factors(like)
    assert nothing.rank == 1 and nothing.lora_A.dtype == like.lora_A.dtype
    assert torch.equal(nothing.delta_weight(), torch.zeros(6, 9, dtype=torch.float64))
    both = LoRAFactors.side_by_side([like, nothing]).delta_weight()
    assert reference.relative_error(both, like.delta_weight()) < 1e-15
