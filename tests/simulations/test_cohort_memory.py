"""Memory of a cohort's pass: the measured peak, and limits that fill a device and never more."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import families
import flexlora.planning.memory_ranks
from builders import random_adapter
from flexlora.aggregation.engine.starts import LocalPlan, Start
from flexlora.config.resolve import Config
from flexlora.data.collation import Example
from flexlora.lora.ranks import RankClass
from flexlora.planning.architectures import shape_from_config
from flexlora.planning.memory import training_memory, weight_bytes
from flexlora.planning.shapes import TrainingPlan
from flexlora.simulations.engine import cohorts
from flexlora.simulations.engine.cohort_memory import CohortMemory, largest_rank
from flexlora.simulations.engine.cohorts import (
    CUDA_TOKENS,
    KEPT_FREE,
    MOST_CLIENTS,
    resolved_limits,
)
from flexlora.training.local import TrainSettings, train
from flexlora.training.slots import slot_model
from flexlora.wire.jobs import TrainJob
from spelled import of_names

GB = 1e9
PLANS = {
    "factors": {"rank": 32, "batch": 1},
    "rows": {"rank": 4, "batch": 2},
    "checkpointing": {"rank": 16, "batch": 2, "gradient_checkpointing": True},
    "sgd": {"rank": 32, "batch": 1, "optim": "sgd"},
    "aligned": {"rank": 16, "batch": 1, "aligned": True},
    "carried by all": {"rank": 8, "batch": 1, "carried_rank": 32},
    "carried apart": {"rank": 8, "batch": 1, "carried_rank": 32},
}


def rows_of(plan, seed):
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, families.VOCAB, (plan.batch, plan.max_length), generator=draw)
    half = plan.max_length - round(plan.max_length * plan.answer_fraction)
    return [
        Example(input_ids=tuple(row), prompt_length=half, prompt="", answer="")
        for row in ids.tolist()
    ]


def cohort_peak(model, plan, slots, *, apart):
    """Live bytes at the peak of a cohort's whole training, the base's weights apart.

    What the first client was sent is counted as in ``training_memory``, the others share it; what
    they carry ``apart`` is there before.
    """
    layered = slot_model(model, plan.target_modules)
    examples = [rows_of(plan, seed) for seed in range(slots)]

    def adapter(rank, seed):
        return random_adapter(layered.shapes, rank, seed=seed, dtype=torch.float32)

    others = [adapter(plan.carried_rank, 9 + k) for k in range(1, slots)] if apart else []

    def once():
        first = Start(
            rank_class=RankClass(name="measured", rank=plan.rank),
            base_round=0,
            trained=adapter(plan.rank, 2),
            carried=adapter(plan.carried_rank, 3) if plan.carried_rank else None,
            carried_dtype=plan.carried_dtype,
            local=LocalPlan(gradient_batches=int(plan.aligned)),
        )
        starts = [first, *(replace(first, carried=own) for own in others)]
        jobs = [
            TrainJob(client_id=f"c{k}", server_round=1, num_server_rounds=1, start=start)
            for k, start in enumerate(starts if apart else [first] * slots)
        ]
        settings = TrainSettings(
            max_steps=2,
            per_device_train_batch_size=plan.batch,
            gradient_checkpointing=plan.gradient_checkpointing,
            optim=plan.optim,
        )
        results = train(layered, jobs, examples, settings)
        assert len({result.adapter.digest() for result in results}) == slots

    once()  # the second has nothing left to set up
    return families.peak_bytes(once)


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_the_peak_of_a_cohort_is_the_predicted_one(name):
    config = families.config_of("llama")
    plan = TrainingPlan(
        max_length=families.LENGTH, dtype="bfloat16", unified_memory=True, **PLANS[name]
    )
    shape, apart = shape_from_config(config.to_dict()), name == "carried apart"
    bases = {"none": sum(weight_bytes(shape, plan))}
    memory = CohortMemory(shape=shape, plan=plan, bases=bases, carried_apart=apart)
    for slots in (1, 5):
        rows = slots * plan.batch
        measured = cohort_peak(families.model_of(config, "bfloat16"), plan, slots, apart=apart)
        assert memory.step_bytes(slots=slots, rows=rows) == pytest.approx(measured, rel=0.06)
    alone = training_memory(shape, replace(plan, batch=rows)).total - memory.base_bytes
    assert alone < 0.94 * measured, "the other slots' factors are seen by the measurement"


def resolved_on(monkeypatch, free_bytes, *, device="cuda", **changes):
    """The configuration as a device with so much free memory resolves it, and its memory."""
    shape = families.published("qwen2.5-0.5b")
    monkeypatch.setattr(flexlora.planning.memory_ranks, "read_shape", lambda _: shape)
    options = {"method__name": "flexlora", "train__gradient_checkpointing": True}
    config = Config().with_values(of_names(model__dtype="bfloat16", **{**options, **changes}))
    base = SimpleNamespace(device=SimpleNamespace(type=device))
    worker = SimpleNamespace(base=base, free_bytes=free_bytes)
    return resolved_limits(config, worker), CohortMemory.of(config, unified=device == "cpu")


@pytest.mark.parametrize("free_bytes", [24 * GB, 80 * GB])
@pytest.mark.parametrize(("length", "batch"), [(128, 1), (256, 4), (512, 4)])
@pytest.mark.parametrize("rank", [8, 64, 200])
def test_the_limits_fill_a_card_and_never_more(monkeypatch, free_bytes, length, batch, rank):
    sizes = {"train__max_length": length, "train__per_device_train_batch_size": batch}
    ranks = {"ranks__policy": "fixed", "ranks__fixed": rank}
    config, memory = resolved_on(monkeypatch, free_bytes, **sizes, **ranks)
    clients, tokens = config.engine.cohort_size, config.engine.cohort_tokens
    budget = (1 - KEPT_FREE["cuda"]) * free_bytes

    def needed(slots, rows):
        """By the terms of one adapter and what the others hold at all times: no more than ours."""
        terms = training_memory(memory.shape, replace(memory.plan, batch=rows))
        own = terms.trained_factors + terms.gradients + terms.optimizer_state
        whole = memory.base_bytes + memory.step_bytes(slots=slots, rows=rows)
        assert terms.total + (slots - 1) * own <= whole
        return whole

    rows = tokens // length
    assert memory.plan.rank == rank and tokens == rows * length
    assert needed(clients, rows) <= budget, "short rows of many clients fit too"
    assert clients == MOST_CLIENTS or needed(clients + 1, rows) > budget
    full = -(-(rows + 1) // batch)
    assert tokens == CUDA_TOKENS or needed(full, rows + 1) > budget


def test_small_passes_are_predicted_too_and_a_larger_card_takes_more(monkeypatch):
    """A row of 128 tokens under rank 64 adds nothing to the widest moment of one adapter."""
    sizes = {"train__max_length": 128, "train__per_device_train_batch_size": 1}
    seen = [
        resolved_on(monkeypatch, free * GB, ranks__policy="fixed", ranks__fixed=64, **sizes)[0]
        for free in (12, 24, 48)
    ]
    tokens = [config.engine.cohort_tokens for config in seen]
    assert tokens[0] < tokens[1] < tokens[2] and tokens[1] > 8 * 128


def test_what_was_given_is_kept_and_more_than_fits_is_not_cut(monkeypatch):
    asked = {"engine__cohort_tokens": 1 << 15, "train__max_length": 512}
    ranks = {"ranks__policy": "fixed", "ranks__fixed": 64}
    config, _ = resolved_on(monkeypatch, 12 * GB, **asked, **ranks)
    batch = config.train.per_device_train_batch_size
    assert config.engine.cohort_tokens == 1 << 15
    assert config.engine.cohort_size == min(MOST_CLIENTS, -(-(1 << 15) // (512 * batch)))
    config, _ = resolved_on(monkeypatch, 12 * GB, engine__cohort_size=40, **ranks)
    assert config.engine.cohort_size == 40


def test_a_cpu_with_room_has_the_plan_it_always_had(monkeypatch):
    for length in (128, 200, 512):
        config, _ = resolved_on(monkeypatch, 500 * GB, device="cpu", train__max_length=length)
        limits = config.engine.cohort_size, config.engine.cohort_tokens
        assert limits == (MOST_CLIENTS, cohorts.CPU_TOKENS)


@pytest.mark.parametrize(
    ("changes", "rank"),
    [
        ({"ranks__policy": "fixed", "ranks__fixed": 200}, 200),
        ({"ranks__policy": "tiers", "ranks__tiers": "8,16"}, 16),
        ({"ranks__policy": "paper:normal", "ranks__scale": 0.5}, 100),
        ({"ranks__policy": "memory"}, 64),
    ],
)
def test_the_rank_is_the_largest_that_the_policy_may_give(changes, rank):
    assert largest_rank(Config().with_values(of_names(**changes))) == rank


def test_what_clients_carry_is_counted_once_where_it_is_the_same():
    def apart(**changes):
        return CohortMemory.of(
            Config().with_values(of_names(**changes)), unified=True
        ).carried_apart

    assert apart(method__name="carried") and apart(method__name="fed-plora")
    assert not apart(method__name="aligned")
    assert not apart(method__name="carried", ranks__policy="fixed")
