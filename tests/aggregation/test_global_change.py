"""What a client is sent: ``T_r(G)`` as factors, live where ``G`` is empty, energies."""

import pytest
import torch

import reference
from builders import random_adapter
from flexlora import aggregate
from flexlora.aggregation.engine.state import GlobalChange
from flexlora.algebra.linalg import FactoredSVD, svd_of_product


@pytest.fixture
def change(shapes):
    """G of rank 5 (6 x 12 at most 6): two clients of ranks 2 and 3."""
    clients = [(random_adapter(shapes, 2, seed=1), 10), (random_adapter(shapes, 3, seed=2), 30)]
    return aggregate(clients)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_factors_multiply_to_the_truncation_with_the_scaling_divided_out(change, rank, rslora):
    adapter = change.adapter(rank, 7.0, rslora=rslora)
    for name, factors in adapter.items():
        assert factors.rank == rank and factors.alpha == 7.0 and factors.rslora == rslora
        truncated = reference.truncate(change.delta_weight(name), rank)
        assert reference.relative_error(reference.delta_weight(factors), truncated) < 1e-11
        ones = torch.ones(rank, dtype=torch.float64)
        torch.testing.assert_close(factors.lora_A.norm(dim=1), ones)  # S is in lora_B


@pytest.mark.parametrize("rank", [5, 6, 12])
def test_a_rank_above_the_available_one_does_not_scale_the_update(change, rank):
    """Trap T15: slicing past the end scaled the update by the ratio of the ranks (2.0x seen)."""
    for name, factors in change.adapter(rank, 16.0).items():
        assert factors.rank == min(rank, factors.out_features, factors.in_features)
        whole = change.delta_weight(name)
        assert reference.relative_error(reference.delta_weight(factors), whole) < 1e-11


def test_padding_is_live_and_leaves_the_update_alone(change):
    """Trap T8: a direction with zeros in both factors has no gradient and never trains again."""
    factors = change.adapter(12, 16.0)["mlp.up"]
    assert torch.count_nonzero(factors.lora_B[:, 5:]) == 0
    assert torch.all(factors.lora_A.norm(dim=1) > 0)
    A = factors.lora_A.clone().requires_grad_()
    B = factors.lora_B.clone().requires_grad_()
    target = torch.randn(20, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (factors.scaling * (B @ A) - target).square().sum().backward()
    live = (A.grad.norm(dim=1) > 0) | (B.grad.norm(dim=0) > 0)
    assert torch.all(live), "a direction without any gradient"


def test_no_change_at_all_starts_as_lora_does(shapes):
    adapter = GlobalChange.zero(shapes, torch.float64).adapter(4, 16.0)
    for factors in adapter.values():
        assert torch.count_nonzero(factors.lora_B) == 0
        assert torch.all(factors.lora_A.norm(dim=1) > 0)
        assert factors.lora_A.dtype == torch.float64


def test_live_rows_are_nested_across_ranks_and_differ_between_modules_and_seeds(shapes):
    zero = GlobalChange.zero(shapes)
    small, large = zero.adapter(3, 16.0, seed=4), zero.adapter(6, 8.0, seed=4)
    for name in shapes:
        assert torch.equal(small[name].lora_A, large[name].lora_A[:3])
    assert not torch.equal(small["attn.q"].lora_A, small["attn.v"].lora_A)
    assert not torch.equal(zero.adapter(3, 16.0, seed=5)["attn.q"].lora_A, small["attn.q"].lora_A)


def test_one_rank_per_module_is_kept(change):
    ranks = {"attn.q": 2, "attn.v": 4, "mlp.up": 9}
    adapter = change.adapter(ranks, 16.0)
    assert {name: factors.rank for name, factors in adapter.items()} == ranks


def test_energies_are_those_of_the_dense_matrices(change):
    """Trap T9: the share that each rank keeps, by module and over all of them."""
    for rank in (1, 3, 5, 40):
        kept, total = 0.0, 0.0
        for name, share in change.energy_kept(rank).items():
            dense = change.delta_weight(name)
            energy = float(reference.truncate(dense, rank).square().sum())
            assert share == pytest.approx(energy / float(dense.square().sum()), rel=1e-10)
            kept, total = kept + energy, total + float(dense.square().sum())
        together = change.total_energy_kept(dict.fromkeys(change, rank))
        assert together == pytest.approx(kept / total, rel=1e-10)


def test_energy_of_no_change_is_kept_whole(shapes):
    zero = GlobalChange.zero(shapes)
    assert zero.energy_kept(2) == dict.fromkeys(shapes, 1.0)
    assert zero.total_energy_kept(dict.fromkeys(shapes, 2)) == 1.0
    assert zero.effective_rank() == 0.0


def test_effective_rank_of_equal_singular_values_is_their_number():
    eye = torch.eye(9, dtype=torch.float64)
    svd = FactoredSVD(U=eye[:, :4], S=torch.full((4,), 0.3), Vh=eye[:4])
    one = FactoredSVD(U=eye[:, :1], S=torch.ones(1), Vh=eye[:1])
    assert GlobalChange({"a": svd}).effective_rank() == pytest.approx(4.0)
    assert GlobalChange({"a": svd, "b": one}).effective_rank() == pytest.approx(2.5)


def test_an_unknown_module_names_the_nearest(change):
    with pytest.raises(KeyError, match=r"no module 'attn.p'.*Did you mean 'attn"):
        change.delta_weight("attn.p")


def test_the_energy_in_what_is_served_is_that_of_the_truncation_and_of_anything_else():
    """``1 - |G - M|^2 / |G|^2`` against the dense difference; ``T_r`` gives ``energy_kept``."""
    shapes = {"a": (9, 7), "b": (6, 11)}
    product = {n: random_adapter(shapes, 5, seed=1)[n].delta_weight() for n in shapes}
    change = GlobalChange(
        {n: svd_of_product(M, torch.eye(M.shape[1]).to(M)) for n, M in product.items()}
    )
    ranks = dict.fromkeys(shapes, 2)
    truncated = change.adapter(2, 4.0)
    assert change.energy_in(truncated) == pytest.approx(change.total_energy_kept(ranks), abs=1e-12)
    other = random_adapter(shapes, 3, seed=2)
    missing = sum(float((product[n] - other[n].delta_weight()).square().sum()) for n in shapes)
    total = sum(float(product[n].square().sum()) for n in shapes)
    assert change.energy_in(other) == pytest.approx(1 - missing / total, rel=1e-9)
