"""Clients on unlike bases in one run: NF4 beside float32, 8-bit beside both."""

import pytest
import torch
from flwr.app import Context, RecordDict

import reference
from builders import random_adapter, random_examples, train_job
from federation import TamperingGrid, client_rows, federation, rounds, small
from flexlora.clients.handler import worker_of
from flexlora.clients.worker import Worker
from flexlora.errors import UserError
from flexlora.planning.shares import deal_quantizations, parse_quantization_shares
from flexlora.simulations.engine.cohorts import CohortLimits, plan_cohorts
from flexlora.simulations.engine.grid import InProcessGrid
from flexlora.simulations.engine.pool import LocalPool
from flexlora.simulations.exporting import export
from flexlora.training import models
from flexlora.training.local import TrainSettings, train
from flexlora.training.models import load_base
from flexlora.training.slots import SlotModel

IDS = [f"client_{i:02}" for i in range(20)]


def dealt(shares, **changes):
    table = deal_quantizations(IDS, **{"shares": shares, "default": "none", "seed": 0, **changes})
    return table, {kind: list(table.values()).count(kind) for kind in set(table.values())}


def test_shares_are_dealt_exactly_and_the_rest_stays_where_it_was():
    assert dealt("")[1] == {"none": 20}
    assert dealt("nf4:0.5")[1] == {"nf4": 10, "none": 10}
    assert dealt("nf4:0.25, 8bit:0.5")[1] == {"nf4": 5, "8bit": 10, "none": 5}
    assert dealt("none:0.5", default="nf4")[1] == {"none": 10, "nf4": 10}
    assert dealt("nf4:1")[1] == {"nf4": 20}


def test_the_deal_depends_on_the_ids_and_the_seed_only_and_not_on_the_ranks():
    table = dealt("nf4:0.5")[0]
    assert deal_quantizations(IDS[::-1], shares="nf4:0.5", default="none", seed=0) == table
    assert dealt("nf4:0.5", seed=1)[0] != table
    worker = Worker(small(clients__count=12, clients__quantization="nf4:0.5"))
    from flexlora.planning.rank_policies import RankPolicy

    ranks = RankPolicy(policy="tiers", tiers="2,4").assign(worker.client_ids)
    pairs = {(ranks[i].rank, worker.quantization_of(i)) for i in worker.client_ids}
    assert len(pairs) == 4, "both ranks on both bases"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nf5:0.5", "names 'nf5', expected some of none, 8bit, nf4.*Did you mean 'nf4'"),
        ("nf4", "'nf4' has no share, expected a name and a share from 0 to 1"),
        ("nf4:half", "the share of nf4 is 'half'"),
        ("nf4:1.5", "the share of nf4 is '1.5'"),
        ("nf4:nan", "the share of nf4 is 'nan'"),
        ("nf4:-0.5", "the share of nf4 is '-0.5'"),
        ("nf4:0.6,8bit:0.6", "adds up to 1.2, expected at most 1"),
        ("nf4:0.2,nf4:0.2", "names nf4 twice"),
    ],
)
def test_shares_that_make_no_sense_are_refused(text, message):
    with pytest.raises(UserError, match=f"clients.quantization is '{text}'.*{message}"):
        parse_quantization_shares(text)


def test_a_cohort_holds_one_base_and_leaves_nobody_out():
    shapes = {"q": (8, 8)}
    jobs = {f"m{i}": train_job(random_adapter(shapes, 2 + i % 3), c) for i, c in enumerate(IDS)}
    table = dealt("nf4:0.25,8bit:0.25")[0]
    limits, alike = CohortLimits(clients=4), {"rows": lambda _: [], "batch_size": 8}
    cohorts = plan_cohorts(jobs, limits, pass_key=table.__getitem__, **alike)
    assert sorted(key for cohort in cohorts for key in cohort) == sorted(jobs)
    for cohort in cohorts:
        assert len({table[jobs[key].client_id] for key in cohort}) == 1 and len(cohort) <= 4
    mixed = plan_cohorts(jobs, limits, **alike)
    assert any(len({table[jobs[key].client_id] for key in cohort}) > 1 for cohort in mixed)


class Watched(LocalPool):
    """Keeps which clients were trained in one call."""

    def train(self, jobs):
        self.trained = [*getattr(self, "trained", []), [job.client_id for job in jobs]]
        return super().train(jobs)


def test_half_of_the_clients_on_nf4_and_half_on_float32(tmp_path):
    config = small(
        clients__count=8,
        clients__quantization="nf4:0.5",
        num_server_rounds=2,
        train__max_steps=6,
        train__per_device_train_batch_size=4,
        lora__target_modules="all-linear",
    )
    worker = Worker(config)
    pool = Watched(worker)
    limits = CohortLimits(clients=4)
    grid = InProcessGrid(worker, limits=limits, wire_dtype="float32", pool=pool)
    _, run = federation(grid, config, tmp_path / "run")
    assert {
        type(b.model.model.layers[0].mlp.up_proj.base).__name__ for b in worker.bases.values()
    } == {
        "Linear4bit",
        "Linear",
    }
    rows = client_rows(run.path, 1)
    held = {row["client_id"]: row["quantization"] for row in rows}
    assert sorted(held.values()) == ["nf4"] * 4 + ["none"] * 4
    assert all(row["device"].startswith(("cpu", "cuda")) and row["rank"] for row in rows)
    assert all(row["status"] == "ok" for row in rows)
    for trained in pool.trained:
        assert len({held[client_id] for client_id in trained}) == 1
    before, after = rounds(run.path)[0], rounds(run.path)[-1]
    for name in ("rank_2", "rank_4"):
        assert after[f"eval_loss/{name}"] < before[f"eval_loss/{name}"] - 0.1
    with pytest.raises(UserError, match=r"trained on a nf4:0\.5 base"):
        export(str(run.path), rank=2, kind="merged", out=str(tmp_path / "merged"))


def test_each_client_trains_as_it_would_in_a_run_of_its_own_kind():
    """Bit for bit: a base beside another is the same base."""
    config = small(clients__quantization="nf4:0.5")
    mixed = Worker(config)
    pure = {kind: Worker(small(model__quantization=kind)) for kind in ("nf4", "none")}
    start = random_adapter(mixed.shapes, 2, seed=4, dtype=torch.float32)
    jobs = [train_job(start, client_id) for client_id in mixed.client_ids]
    results = mixed.train(jobs)
    assert [r.client_id for r in results] == mixed.client_ids
    for kind, worker in pure.items():
        mine = [k for k, job in enumerate(jobs) if mixed.quantization_of(job.client_id) == kind]
        assert len(mine) == 2
        alone = worker.train([jobs[k] for k in mine])
        for k, result in zip(mine, alone, strict=True):
            assert result.adapter.digest() == results[k].adapter.digest()
    gaps = [
        reference.adapter_distance(pure["none"].train([job])[0].adapter, result.adapter)
        for job, result in zip(jobs, results, strict=True)
    ]
    for job, gap in zip(jobs, gaps, strict=True):
        # One client alone is another plan than two together: AdamW amplifies rounding to 1e-4.
        assert gap > 0.1 if mixed.quantization_of(job.client_id) == "nf4" else gap < 1e-4


def test_the_bases_are_one_model_to_the_server(tmp_path):
    """The fingerprint does not depend on the quantization, so nobody is left out."""
    config = small(clients__quantization="nf4:0.25,8bit:0.25")
    worker = Worker(config)
    reports = [worker.capability(client_id) for client_id in worker.client_ids]
    assert sorted(report.quantization for report in reports) == ["8bit", "nf4", "none", "none"]
    assert len({report.fingerprint for report in reports}) == 1
    _, run = federation(TamperingGrid(worker), config, tmp_path / "run")
    assert [row["status"] for row in client_rows(run.path)] == ["ok"] * 4


def test_a_node_says_in_its_node_config_how_it_holds_its_base():
    def context(**node):
        return Context(
            run_id=1, node_id=7, node_config=node, state=RecordDict(), run_config=small().flat()
        )

    chosen, client_id = worker_of(context(**{"partition-id": 1, "quantization": "nf4"}))
    assert chosen.capability(client_id).quantization == "nf4"
    plain, client_id = worker_of(context(**{"partition-id": 1}))
    assert plain.capability(client_id).quantization == "none"
    with pytest.raises(UserError, match="'nf5', expected one of none, 8bit, nf4"):
        worker_of(context(**{"partition-id": 1, "quantization": "nf5"}))


# 8-bit bases


@pytest.fixture
def int8(monkeypatch):
    """The embedded base in 8 bits as a run loads it, fresh, by threshold."""
    monkeypatch.setattr(models, "_loaded", {})

    def load(threshold=0.0):
        chosen = {"quantization": "8bit", "device": "cpu", "outlier_threshold": threshold}
        return load_base("embedded", **chosen).model

    return load


def trained_alone_and_together(model):
    slots = SlotModel(model, "q_proj,down_proj")
    jobs = [
        train_job(random_adapter(slots.shapes, 3, seed=k, dtype=torch.float32), f"c{k}")
        for k in range(3)
    ]
    rows = [random_examples(4, seed=k) for k in range(3)]
    chosen = TrainSettings(learning_rate=0.05, optim="sgd", max_steps=2)
    together = train(slots, jobs, rows, chosen)
    alone = [train(slots, [job], [own], chosen)[0] for job, own in zip(jobs, rows, strict=True)]
    pairs = zip(together, alone, strict=True)
    return together, jobs, max(reference.adapter_distance(a.adapter, b.adapter) for a, b in pairs)


def test_an_8_bit_base_is_really_8_bits_and_trains(int8):
    model = int8()
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert type(layer).__name__ == "Linear8bitLt" and layer.weight.dtype == torch.int8
    before = layer.weight.data.clone()
    results, jobs, _ = trained_alone_and_together(model)
    for result, job in zip(results, jobs, strict=True):
        assert result.loss_after < result.loss_before
        assert reference.adapter_distance(result.adapter, job.start.trained) > 1e-3
    assert torch.equal(layer.weight.data, before)


def test_8_bit_logits_are_near_those_of_the_float_base_and_not_equal(int8):
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        plain = load_base("embedded", device="cpu").model(ids).logits
        error = float((int8()(ids).logits - plain).norm() / plain.norm())
    assert 1e-4 < error < 0.1


def test_without_outliers_slots_do_not_feel_each_other(int8):
    assert trained_alone_and_together(int8())[2] < 1e-4


def test_with_an_outlier_threshold_each_client_is_alone():
    """Which inputs are outliers is decided over the whole batch: so no batch has two clients."""
    worker = Worker(small(model__quantization="8bit", model__outlier_threshold=6.0))
    assert len({worker.pass_key(client_id) for client_id in worker.client_ids}) == 4
    assert worker.base.model.model.layers[0].mlp.up_proj.state.threshold == 6.0
    shared = Worker(small(model__quantization="8bit"))
    assert {shared.pass_key(client_id) for client_id in shared.client_ids} == {"8bit"}
    plain = Worker(small(model__outlier_threshold=6.0))
    assert {plain.pass_key(client_id) for client_id in plain.client_ids} == {"none"}
    start = random_adapter(worker.shapes, 2, seed=4, dtype=torch.float32)
    jobs = [train_job(start, client_id) for client_id in worker.client_ids[:2]]
    together = worker.train(jobs)
    for job, result in zip(jobs, together, strict=True):
        assert worker.train([job])[0].adapter.digest() == result.adapter.digest()
