"""``basis`` and ``ffa-lora`` with noise: clip norm and sum against dense float64, noise by moments.

What is clipped and hidden is ``L_k = s_k B_k - s B_start`` ``[out, R]``, whatever ``lora_A`` is.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import reference
from builders import random_adapter
from flexlora.aggregation import make_method
from flexlora.aggregation.aggregate import aggregate
from flexlora.aggregation.engine.gaussian_sum import GaussianSum
from flexlora.aggregation.engine.held_factors import held_factors
from flexlora.aggregation.engine.linear_update import linear_norm
from flexlora.lora.adapters import Adapter
from flexlora.lora.ranks import RankClass
from one_round import SHAPES, OneRound, next_state, no_change, same_bits

METHODS = ("basis", "ffa-lora")
EXPECTED = 5.0


def linear(name):
    return make_method(name, **({"server_learning_rate": 1.0} if name == "basis" else {}))


def gaussian(clip=1.0, noise=0.0, expected=EXPECTED, seed=1):
    return GaussianSum(clip=clip, noise_multiplier=noise, expected_clients=expected, seed=seed)


def begun(name, wire="float64"):
    """A round after a trained one: ``ffa-lora`` starts from a ``lora_B`` that is not zero."""
    return OneRound(linear(name), next_state(name, wire=wire), wire=wire)


def columns(round_, update):
    """``L_k`` by module, dense in float64 at the widest rank, from the factors themselves."""
    start, widest = round_.sent[update.rank_class].trained, round_.sent["rank_7"].trained
    found = {}
    for name, factors in update.adapter.items():
        before, rank = start[name], factors.lora_B.shape[1]
        full = torch.zeros(factors.out_features, widest[name].rank, dtype=torch.float64)
        full[:, :rank] = reference.scaling(factors) * factors.lora_B.double()
        full[:, :rank] -= reference.scaling(before) * before.lora_B.double()
        found[name] = full
    return found


def norm_of(change):
    return math.sqrt(sum(float(matrix.square().sum()) for matrix in change.values()))


def moved(round_, after):
    """The change of ``G`` by module, dense."""
    before = round_.state.change
    return {n: after.change.delta_weight(n) - before.delta_weight(n) for n in after.change}


@pytest.mark.parametrize("wire", ["float64", "bfloat16"])
@pytest.mark.parametrize("name", METHODS)
def test_the_norm_that_is_clipped_is_that_of_the_dense_columns(name, wire):
    round_ = begun(name, wire)
    for k in range(3):
        update = round_.update(k)
        dense = norm_of(columns(round_, update))
        start = round_.sent[update.rank_class].trained
        assert linear_norm(update.adapter, start) == pytest.approx(dense, rel=1e-12)
        from_zero = linear_norm(update.adapter)
        assert (from_zero == pytest.approx(dense, rel=1e-3)) == (name == "basis")


@pytest.mark.parametrize("clip", [0.3, 2.0, 1e6])
@pytest.mark.parametrize("name", METHODS)
def test_the_sum_is_that_of_the_dense_clipped_columns_over_the_constant(name, clip):
    round_ = begun(name)
    updates = [round_.update(k, 10 + 7 * k) for k in range(4)]
    change = moved(round_, round_.finish(updates, private=gaussian(clip)))
    parts = [columns(round_, update) for update in updates]
    for module in SHAPES:
        total = reference.clipped_sum(
            [part[module] for part in parts], [norm_of(part) for part in parts], clip
        )
        A = round_.sent["rank_7"].trained[module].lora_A.double()
        assert reference.relative_error(change[module], total / EXPECTED @ A) < 1e-9


@pytest.mark.parametrize("wire", ["float64", "bfloat16"])
@pytest.mark.parametrize("name", METHODS)
def test_one_client_moves_the_columns_by_no_more_than_the_clip(name, wire):
    """Also where the rows of A are not orthonormal: the noise is on the columns."""
    round_ = begun(name, wire)
    others = [round_.update(k) for k in range(3)]
    last = round_.update(3, rank_class="rank_7")
    large = {n: replace(f, lora_B=1e4 * f.lora_B) for n, f in last.adapter.items()}
    last = replace(last, adapter=Adapter(large))
    change = (
        moved(round_, round_.finish(updates, private=gaussian(0.7)))
        for updates in (others, [*others, last])
    )
    without, with_it = change
    widest = round_.sent["rank_7"].trained
    solved = {
        n: (with_it[n] - without[n]).double() @ torch.linalg.pinv(widest[n].lora_A.double())
        for n in SHAPES
    }
    assert EXPECTED * norm_of(solved) == pytest.approx(0.7, rel=1e-4)


def test_without_starts_ffa_lora_adds_up_products_over_any_rows():
    """``aggregate`` of adapters that share no ``lora_A``: the mean of the products, exactly."""
    clients = [(random_adapter(SHAPES, 2 + k, seed=k), 3 + k) for k in range(3)]
    change = aggregate(clients, method="ffa-lora")
    for module in SHAPES:
        dense = reference.flexlora_average(clients, module)
        assert reference.relative_error(change.delta_weight(module), dense) < 1e-12


# --- the noise ---------------------------------------------------------------------------------

WIDE, RANK = {"attn.q": (640, 24), "mlp.up": (512, 32)}, 8


def noise_of(name, clip, noise, expected, seed=7):
    """The columns after a round to which nobody came: they are the noise, ``[out, 8]``."""
    classes = tuple(RankClass(name=f"rank_{rank}", rank=rank) for rank in (2, RANK))
    round_ = OneRound(linear(name), no_change(WIDE), classes=classes)
    after = round_.finish([], private=gaussian(clip, noise, expected, seed))
    assert after.round == 1
    found = {}
    for module, start in round_.sent[f"rank_{RANK}"].trained.items():
        change = after.change.delta_weight(module)
        found[module] = change @ torch.linalg.pinv(start.lora_A.double())
        assert torch.linalg.matrix_rank(change) == RANK
    return found


def variance_fits(drawn, deviation):
    """Whether n numbers have this variance, within 5 deviations ``sqrt(2 / n)``: 7 %."""
    numbers = torch.cat([matrix.flatten() for matrix in drawn.values()])
    bound = 5 * math.sqrt(2 / numbers.numel())
    assert bound < 0.08
    return abs(float(numbers.square().mean()) / deviation**2 - 1) < bound


@pytest.mark.parametrize(("clip", "noise", "expected"), [(0.5, 1.2, 8.0), (3.0, 0.4, 100.0)])
@pytest.mark.parametrize("name", METHODS)
def test_the_variance_of_each_column_s_noise_is_that_of_the_accountant(name, clip, noise, expected):
    """The control: noise that is wrong by a factor 2, of the deviation or of the variance."""
    stated = noise * clip / expected
    assert variance_fits(noise_of(name, clip, noise, expected), stated)
    for wrong in (2.0, 0.5, math.sqrt(2.0), math.sqrt(0.5)):
        assert not variance_fits(noise_of(name, clip, wrong * noise, expected), stated)


def test_noise_of_modules_and_columns_is_independent_and_gaussian():
    drawn = noise_of("basis", 1.0, 1.0, 1.0)
    first, second = drawn["attn.q"], drawn["mlp.up"]
    assert abs(float((first[:512] * second).mean())) < 5 / math.sqrt(512 * RANK)
    for matrix in drawn.values():
        assert float(matrix.pow(4).mean()) == pytest.approx(3.0, rel=0.25)
        gram = matrix.T @ matrix / matrix.shape[0] - torch.eye(RANK, dtype=torch.float64)
        assert float(gram.abs().max()) < 5 * math.sqrt(2 / matrix.shape[0])
    again, other = noise_of("basis", 1.0, 1.0, 1.0), noise_of("basis", 1.0, 1.0, 1.0, seed=8)
    assert all(torch.equal(drawn[n], again[n]) for n in WIDE)
    assert not torch.allclose(drawn["attn.q"], other["attn.q"])


@pytest.mark.parametrize("name", METHODS)
def test_who_came_does_not_show_in_the_noise(name):
    """Nobody, or a client of the lowest rank that changed nothing: the same bits, at full width."""
    round_ = begun(name)
    noise = gaussian(noise=1.0)
    nobody = round_.finish([], private=noise)
    weak = round_.finish([round_.update(0, rank_class="rank_2", trained=False)], private=noise)
    assert same_bits(nobody, weak)
    for module, change in moved(round_, nobody).items():
        assert torch.linalg.matrix_rank(change, rtol=1e-9) == min(7, *SHAPES[module])


def test_noise_leaves_the_rows_of_ffa_lora_as_they_are():
    round_ = begun("ffa-lora")
    noise = gaussian(noise=1.0)
    after = round_.finish([], private=noise)
    for module in SHAPES:
        (A, B), (rows, last) = (held_factors(s, module) for s in (after, round_.state))
        assert torch.equal(A, rows)
        drawn = noise.noise(module, tuple(last.shape), torch.float64)
        assert torch.allclose(B - last, drawn, atol=1e-14)
