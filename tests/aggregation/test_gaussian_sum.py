"""Clipped sums with noise against dense float64; the noise's variance; what one client can move."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import reference
from flexlora.aggregation import make_method
from flexlora.aggregation.engine.gaussian_sum import GaussianSum
from flexlora.aggregation.engine.norm_bound import norms_of
from flexlora.aggregation.engine.state import State
from flexlora.lora.ranks import RankClass
from one_round import SHAPES, OneRound, global_change, no_change

METHODS = ("carried", "residual", "aligned")


def private(method, clip=1.0, noise=0.0, expected=5.0, seed=1):
    step = make_method(method, server_learning_rate=1.0)
    return step, GaussianSum(
        clip=clip, noise_multiplier=noise, expected_clients=expected, seed=seed
    )


def state():
    return State(round=0, change=global_change())


def dense_change(round_, update):
    """``D_k`` by module, dense in float64."""
    start = round_.sent[update.rank_class].trained
    names = update.adapter
    return {n: update.adapter.delta_weight(n) - start.delta_weight(n) for n in names}


def dense_norm(change):
    return math.sqrt(sum(float(matrix.double().square().sum()) for matrix in change.values()))


@pytest.mark.parametrize("method", METHODS)
def test_the_norm_that_is_clipped_is_the_dense_one(method):
    round_ = OneRound(private(method)[0], state())
    for k in range(3):
        update = round_.update(k)
        energy = norms_of(update.adapter, round_.sent[update.rank_class].trained).change
        dense = dense_norm(dense_change(round_, update))
        assert math.sqrt(energy) == pytest.approx(dense, rel=1e-10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("clip", [0.3, 2.0, 1e6])
def test_the_sum_is_the_dense_one_of_clipped_changes_over_the_constant(method, clip):
    chosen, gaussian = private(method, clip)
    round_ = OneRound(chosen, state())
    updates = [round_.update(k, 10 + 7 * k) for k in range(4)]
    after = round_.finish(updates, private=gaussian)
    changes = [dense_change(round_, update) for update in updates]
    for name in SHAPES:
        expected = (
            round_.state.change.delta_weight(name)
            + reference.clipped_sum(
                [change[name] for change in changes], [dense_norm(c) for c in changes], clip
            )
            / 5.0
        )
        got = after.change.delta_weight(name)
        assert reference.relative_error(got, expected) < 1e-9


def test_examples_do_not_count():
    chosen, gaussian = private("carried", 0.5)
    round_ = OneRound(chosen, state())
    few, many = ([round_.update(k, n) for k in range(3)] for n in (1, 500))
    many[0] = replace(many[0], num_examples=1)
    one, other = (round_.finish(u, private=gaussian).change for u in (few, many))
    for name in SHAPES:
        assert torch.equal(one.delta_weight(name), other.delta_weight(name))


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_one_client_moves_the_sum_by_no_more_than_the_clip(scale):
    chosen, gaussian = private("carried", 0.7)
    round_ = OneRound(chosen, state())
    others = [round_.update(k) for k in range(3)]
    last = round_.update(3, rank_class="rank_7")
    factors = {n: replace(f, lora_B=scale * f.lora_B) for n, f in last.adapter.items()}
    last = replace(last, adapter=type(last.adapter)(factors))
    without = round_.finish(others, private=gaussian).change
    with_it = round_.finish([*others, last], private=gaussian).change
    moved = {n: with_it.delta_weight(n) - without.delta_weight(n) for n in SHAPES}
    assert 5.0 * dense_norm(moved) == pytest.approx(0.7, rel=1e-6)


WIDE = {"attn.q": (64, 48), "mlp.up": (96, 64)}


def noise_of(clip, noise, expected, seed=7):
    """The numbers of a round to which nobody came: its change is the noise."""
    chosen = make_method("carried", server_learning_rate=1.0, server_max_rank=10**6)
    gaussian = GaussianSum(clip=clip, noise_multiplier=noise, expected_clients=expected, seed=seed)
    round_ = OneRound(chosen, no_change(WIDE), classes=(RankClass(name="rank_2", rank=2),))
    after = round_.finish([], private=gaussian)
    assert after.round == 1
    return {name: after.change.delta_weight(name) for name in WIDE}


@pytest.mark.parametrize(("clip", "noise", "expected"), [(0.5, 1.2, 8.0), (3.0, 0.4, 100.0)])
def test_the_variance_of_the_noise_is_that_of_the_accountant(clip, noise, expected):
    """n numbers: their variance is within 5 deviations ``sqrt(2 / n)``, 7 %, and not twice it."""
    drawn = torch.cat([matrix.flatten() for matrix in noise_of(clip, noise, expected).values()])
    wanted, count = (noise * clip / expected) ** 2, drawn.numel()
    ratio, bound = float(drawn.square().mean()) / wanted, 5 * math.sqrt(2 / count)
    assert abs(ratio - 1) < bound < 0.08
    assert abs(float(drawn.mean())) < 5 * math.sqrt(wanted / count)
    for wrong in (2.0, 0.5, 4.0):  # a variance for a deviation, a factor 2 of either
        assert abs(ratio * wrong - 1) > bound


def test_the_noise_is_gaussian_and_of_no_rank():
    drawn = noise_of(1.0, 1.0, 1.0)
    for matrix in drawn.values():
        assert float(matrix.pow(4).mean()) == pytest.approx(3.0, rel=0.15)
        assert torch.linalg.matrix_rank(matrix) == min(matrix.shape)
    first, second = drawn["attn.q"], drawn["mlp.up"][:64, :48]
    assert abs(float((first * second).mean())) < 5 / 64 / 48**0.5


def test_the_seed_is_all_that_the_noise_depends_on():
    one, again, other = noise_of(1.0, 1.0, 1.0), noise_of(1.0, 1.0, 1.0), noise_of(1.0, 1.0, 1.0, 8)
    assert all(torch.equal(one[name], again[name]) for name in WIDE)
    assert not torch.allclose(one["attn.q"], other["attn.q"])
