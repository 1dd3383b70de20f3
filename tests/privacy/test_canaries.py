"""Canaries: legal updates of a known change, found again in the global change."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from flexlora.aggregation.engine.state import GlobalChange
from flexlora.aggregation.engine.updates import Update, check_update
from flexlora.algebra.linalg import svd_of_product
from flexlora.privacy.canaries import Canaries
from flexlora.privacy.canary_audit import audit_canaries
from flexlora.privacy.canary_scores import canary_scores, in_statistic, linear_statistic
from one_round import global_change, noisy
from reference import delta_weight

NORM = 0.7


def canaries(count=12, **changes):
    return Canaries(**{"secret": 5, "count": count, "norm": NORM, **changes})


def start_of(rank, seed=0):
    """Factors near those of a G, as a client of ``rank`` is sent them."""
    return noisy(change(seed).adapter(rank, 16.0), ("lora_A", "lora_B"), seed)


def change(seed):
    return global_change(seed=seed)


def moved(client_id, start, made):
    """What the canary's update adds, dense, by module."""
    update = made.update(client_id, start)
    return {name: delta_weight(update[name]) - delta_weight(start[name]) for name in start}


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_an_update_adds_one_rank_one_change_of_the_norm_in_every_module(rank):
    made, start = canaries(), start_of(rank)
    added = moved("canary_003", start, made)
    assert math.sqrt(sum(float(d.square().sum()) for d in added.values())) == pytest.approx(NORM)
    for name, dense in added.items():
        S = torch.linalg.svdvals(dense)
        assert S[0] == pytest.approx(NORM / math.sqrt(len(start))) and S[1] < 1e-9 * S[0]
        columns, rows = made.changes(["canary_003"], {"canary_003": start}, name)
        assert torch.allclose(columns.T @ rows, dense, atol=1e-12)
    update = made.update("canary_003", start)
    check_update(Update(client_id="canary_003", adapter=update, num_examples=1), start)
    assert all(torch.equal(update[name].lora_A, start[name].lora_A) for name in start)


def test_directions_and_coins_are_the_secrets():
    start, ids = start_of(2), canaries(400).client_ids
    one, again = moved(ids[0], start, canaries()), moved(ids[0], start, canaries())
    other, elsewhere = moved(ids[1], start, canaries()), moved(ids[0], start, canaries(secret=6))
    name = next(iter(one))
    assert torch.equal(one[name], again[name])
    assert not torch.allclose(one[name], other[name])
    assert not torch.allclose(one[name], elsewhere[name])
    coins = [canaries(400).included(client_id) for client_id in ids]
    assert 160 < sum(coins) < 240
    assert coins != [canaries(400, secret=6).included(client_id) for client_id in ids]


def test_a_score_is_the_dense_inner_product():
    made, before, after = canaries(), change(1), change(2)
    starts = {c: start_of(2 + k % 3) for k, c in enumerate(made.client_ids)}
    scores = canary_scores(before, after, made, starts)
    for client_id, score in zip(starts, scores, strict=True):
        expected = sum(
            float(((after.delta_weight(name) - before.delta_weight(name)) * dense).sum())
            for name, dense in moved(client_id, starts[client_id], made).items()
        )
        assert score == pytest.approx(expected / NORM**2, rel=1e-9, abs=1e-12)


def test_a_canary_in_the_sum_scores_its_weight():
    made, before, start = canaries(2), change(1), start_of(2)
    there, absent = made.client_ids
    sums = {
        name: svd_of_product(*_side_by_side(svd, 0.25 * dense))
        for (name, svd), dense in zip(
            before.items(), moved(there, start, made).values(), strict=True
        )
    }
    scores = canary_scores(before, GlobalChange(sums), made, dict.fromkeys((there, absent), start))
    assert scores[0] == pytest.approx(0.25, rel=1e-9) and abs(scores[1]) < 0.2


def _side_by_side(svd, dense):
    left = torch.cat([svd.U * svd.S, dense], dim=1)
    return left, torch.cat([svd.Vh, torch.eye(dense.shape[1], dtype=dense.dtype)])


def test_the_statistic_is_a_log_likelihood_ratio():
    row = [0.3, -0.1, 0.02, 0.9, -0.4, 0.05]
    spread = 1.4826 * np.median(np.abs(np.array(row) - np.median(row)))
    weight, share = 0.5, 0.3
    exponent = (np.array(row) * weight - weight**2 / 2) / spread**2
    expected = np.log(1 - share + share * np.exp(exponent))
    assert in_statistic([row, row], [weight] * 2, share) == pytest.approx(2 * expected)
    # Sampled in every round: linear in the score, so its order is that of the sum.
    certain = in_statistic([row, row], [weight] * 2, 1.0)
    order = np.argsort(linear_statistic([row, row], [weight] * 2))
    assert np.argsort(certain).tolist() == order.tolist() == np.argsort(row).tolist()


def test_a_round_that_changed_nothing_says_nothing():
    quiet = [0.0] * 4
    assert in_statistic([quiet], [0.5], 0.5) == quiet == linear_statistic([quiet], [0.5])


def test_figures_by_rank_class():
    draw, count = np.random.default_rng(0), 120
    included = (draw.random(count) < 0.5).tolist()
    classes = ["rank_2" if k % 2 else "rank_8" for k in range(count)]
    seen = [coin and name == "rank_8" for coin, name in zip(included, classes, strict=True)]
    scores = [[3.0 * s + draw.normal() for s in seen] for _ in range(4)]
    found = audit_canaries(scores, [1.0] * 4, 0.9, included=included, classes=classes, delta=1e-5)
    everyone, low, high = sorted(found, key=lambda one: one.name)
    assert [one.canaries for one in (everyone, low, high)] == [120, 60, 60]
    assert high.lower.epsilon > 1.5 > low.lower.epsilon == 0.0
    assert high.auc > 0.99 and abs(low.auc - 0.5) < 0.2
    assert high.estimate > everyone.lower.epsilon > 0
