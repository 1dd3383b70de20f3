"""Attacks: what they send, that it fits the client's factors, and a run under one."""

from __future__ import annotations

import pytest
import torch

import reference
from federation import client_rows, small
from flexlora.aggregation.engine.robust_rules import RobustMean
from flexlora.config.resolve import Config
from flexlora.data.poisoning import parse_hostile
from flexlora.simulations.engine.pool import Later
from flexlora.simulations.experiments import hostile_runs
from flexlora.simulations.experiments.hostile_clients import (
    CLEAN,
    RULES,
    backdoor_table,
    hostile_variants,
    loss_table,
    run_checks,
)
from flexlora.simulations.hostile.attacks import Round, change_of, crafted, factors_of
from flexlora.simulations.hostile.pool import HostilePool
from flexlora.wire.jobs import TrainJob, TrainResult
from one_round import SHAPES, OneRound

HONEST, EVIL = 8, 2


def changes(count=HONEST, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mean = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in SHAPES.items()}
    return [
        {
            n: D + torch.randn(D.shape, generator=generator, dtype=torch.float64)
            for n, D in mean.items()
        }
        for _ in range(count)
    ]


def known(robust=None, norm_ratio=50.0):
    return Round(honest=changes(), hostile=EVIL, robust=robust, norm_ratio=norm_ratio)


def flat(change):
    return torch.cat([change[name].flatten() for name in sorted(change)])


def test_simple_attacks_are_multiples_of_the_attackers_own_change():
    (own,) = changes(1, seed=5)
    assert torch.equal(flat(crafted("sign-flip", known(), own)), -flat(own))
    norms = torch.stack([flat(D) for D in known().honest]).norm(dim=1)
    lower_median = norms.sort().values[(HONEST - 1) // 2]
    scaled = flat(crafted("scaling", known(norm_ratio=10.0), own))
    assert float(scaled.norm()) == pytest.approx(9.0 * float(lower_median))
    boosted = flat(crafted("backdoor-boosted", known(), own))
    assert reference.relative_error(boosted, 5.0 * flat(own)) < 1e-12
    bounded = flat(crafted("backdoor-boosted", known(norm_ratio=2.0), own))
    assert float(bounded.norm()) == pytest.approx(1.8 * float(lower_median))


def test_mimics_send_an_honest_change():
    sent = flat(crafted("mimic", known(), changes(1, seed=5)[0]))
    assert any(torch.equal(sent, flat(D)) for D in known().honest)


@pytest.mark.parametrize("attack", ["alie", "inner-product"])
@pytest.mark.parametrize("rule", [None, "multi-krum", "nearest-trimmed-mean"])
def test_a_line_search_attack_goes_against_the_mean_as_far_as_pays(attack, rule):
    robust = rule and RobustMean(rule=rule, hostile=EVIL)
    view = known(robust)
    own = changes(1, seed=5)[0]
    sent, honest = flat(crafted(attack, view, own)), torch.stack([flat(D) for D in view.honest])
    mean, deviation = honest.mean(dim=0), honest.std(dim=0)
    step = mean if attack == "inner-product" else deviation * mean.sign()
    tau = float(((mean - sent) @ step) / (step @ step))
    assert tau > 0 and reference.relative_error(sent, mean - tau * step) < 1e-9

    def moved(vector):
        rows = torch.cat([vector.expand(EVIL, -1), honest])
        if robust is None:
            return float((rows.mean(dim=0) - mean).norm())
        return float((robust.coefficients(rows @ rows.T) @ rows - mean).norm())

    assert moved(sent) >= 0.95 * max(moved(mean - tau * step) for tau in (0.1, 0.5, 2.0, 10.0))
    if rule is None:
        assert float(sent.norm()) > 20.0 * float(honest.norm(dim=1).median()), "near the bound"
    else:
        assert moved(sent) < 0.1 * view.largest_norm, "half as far as it could move the mean"


@pytest.mark.parametrize("method", ["carried", "basis", "rolora"])
def test_what_is_sent_is_the_nearest_that_the_factors_can_express(method):
    round_ = OneRound(method)
    start, (change,) = round_.start(0), changes(1)
    adapter = factors_of(change, start)
    for name, sent in start.trained.items():
        target = reference.delta_weight(sent) + change[name]
        got = adapter[name]
        assert got.rank == sent.rank and got.alpha == sent.alpha
        assert got.lora_A.dtype == sent.lora_A.dtype
        if method == "carried":
            expected = reference.truncate(target, sent.rank)
        else:
            A = sent.lora_A.double()
            expected = target @ torch.linalg.pinv(A) @ A
            assert torch.equal(got.lora_A, sent.lora_A)
        assert reference.relative_error(reference.delta_weight(got), expected) < 1e-9
    low = change_of(round_.update(0).adapter, start)
    again = change_of(factors_of(low, start), start)
    assert reference.relative_error(flat(again), flat(low)) < 1e-9, "the change is as it was"


class NoisyPool:
    """Every job comes back as seeded noise on its start."""

    def __init__(self, round_):
        self.round = round_

    def train(self, jobs):
        return Later(lambda: [self.result(job) for job in jobs])

    def result(self, job):
        update = self.round.update(int(job.client_id.removeprefix("client_")))
        return TrainResult(
            client_id=job.client_id,
            rank_class=update.rank_class,
            base_round=0,
            digest=update.digest,
            num_examples=5,
            adapter=update.adapter,
        )


def pooled(attack, server_round=1, count=10):
    round_ = OneRound("carried")
    ids = [f"client_{k}" for k in range(count)]
    hostile = parse_hostile(attack)
    pool = HostilePool(NoisyPool(round_), Config(), hostile, ids)
    jobs = [
        TrainJob(
            client_id=client_id,
            server_round=server_round,
            num_server_rounds=3,
            start=round_.start(k),
        )
        for k, client_id in enumerate(ids)
    ]
    cohorts = [pool.train(jobs[:4]), pool.train(jobs[4:])]
    results = [result for cohort in cohorts for result in cohort.result()]
    honest = [NoisyPool(round_).result(job) for job in jobs]
    return pool.clients, results, honest


@pytest.mark.parametrize("attack", ["sign-flip:0.2", "alie:0.2", "mimic:0.2", "scaling:0.2"])
def test_only_the_hostile_clients_results_are_replaced(attack):
    evil, results, honest = pooled(attack)
    assert len(evil) == 2
    for result, other in zip(results, honest, strict=True):
        same = reference.adapter_distance(result.adapter, other.adapter) < 1e-12
        assert same == (result.client_id not in evil)
        assert result.num_examples == 5 and result.digest == other.digest


def test_attackers_leave_after_their_last_round():
    evil, results, _ = pooled("sign-flip:0.2:1", server_round=2)
    assert {r.client_id for r in results if r.adapter is None} == evil
    assert {r.cause for r in results if r.adapter is None} == {
        "it attacked in earlier rounds and has left"
    }


def test_where_all_are_hostile_nobody_is_there_to_be_imitated():
    _, results, honest = pooled("alie:1")
    assert all(
        reference.adapter_distance(r.adapter, h.adapter) < 1e-12
        for r, h in zip(results, honest, strict=True)
    )


def test_a_run_under_a_backdoor_scores_honest_clients_and_the_trigger(tmp_path, monkeypatch):
    monkeypatch.setattr(hostile_runs, "TRIGGERED_ROWS", 3)
    config = small(
        population__hostile="backdoor:0.25:1",
        num_server_rounds=2,
        server__late_rounds=0,
        fraction_train=1.0,
        eval__every=0,
        eval__generate="ends",
        robust__rule="geometric-median",
    )
    scores = hostile_runs.hostile_run(config, tmp_path / "run")
    assert [entry["round"] for entry in scores["rounds"]] == [1, 2]
    assert all(0.0 <= v <= 1.0 for e in scores["rounds"] for k, v in e.items() if k != "round")
    assert scores["loss"] > 0.0 and 0.0 <= scores["exact match"] <= 1.0
    gone = [r for r in client_rows(tmp_path / "run", 2) if r["status"] != "ok"]
    assert len(gone) == 1 and "has left" in gone[0]["cause"]


def test_the_experiment_has_every_attack_under_every_rule_and_a_verdict():
    variants = hostile_variants()
    assert len({variant.title for variant in variants}) == len(variants) == 9 * len(RULES) + 3
    for variant in variants:
        Config.of(variant.changes)
    rows = [
        {"variant": f"{title}, {rule}", "seed": 0, "loss": loss, "exact match": 0.5}
        for title, rule, loss in (
            (CLEAN, "none", 1.0),
            ("alie", "none", 3.0),
            ("alie", "multi-krum", 1.04),
            ("mimic", "none", 1.2),
        )
    ]
    verdicts = {check.claim: check.holds for check in run_checks(rows)}
    assert verdicts == {
        "alie: loss over that without attack, under multi-krum": True,
        "mimic: loss over that without attack, under none": False,
    }
    assert loss_table(rows).row_count == 9
    rows[1]["rounds"] = [{"round": r, "rank_2": 0.5, "rank_8": 1.0} for r in (1, 2)]
    rows[2]["rounds"] = [{"round": 1, "rank_2": 0.0, "rank_8": 0.0}]
    assert backdoor_table(rows).row_count == 4, "runs of unequal length"
