"""Factors and adapters: scaling where ranks and alphas differ, and what is refused."""

import math

import pytest
import reference
import torch
from builders import random_adapter, random_factors

from flexlora import Adapter, LoRAFactors


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
