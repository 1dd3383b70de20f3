"""A cohort through ``W + s B A`` and through its factors: one function, and who takes which."""

import pytest
import torch

import reference
from builders import random_adapter, random_examples, tiny_model, train_job
from flexlora.data.collation import collate
from flexlora.training import layers
from flexlora.training.layers import low_rank_cost
from flexlora.training.local import TrainSettings, answer_losses, train
from flexlora.training.slots import SlotModel

BOTH = ("lora_A", "lora_B")
RANKS = (1, 3, 9)


@pytest.fixture(params=["factors", "whole"])
def way(request, monkeypatch):
    return forced(request.param, monkeypatch)


def forced(way, monkeypatch):
    """Every module that may choose goes this way; the list says which have chosen."""
    chosen = []
    cost = (0.0, 1.0) if way == "factors" else (1.0, 0.0)
    monkeypatch.setattr(layers, "low_rank_cost", lambda *_: chosen.append(way) or cost)
    return chosen


def carried_of(shapes, kind):
    one = random_adapter(shapes, 6, alpha=3.0, seed=20)
    other = random_adapter(shapes, 11, rslora=True, seed=21)
    return {"none": None, "shared": [one] * 3, "own": [one, None, other]}[kind]


def results(architecture, way, monkeypatch, *, carried="none", trainable=BOTH, first=3):
    """Losses by slot and the gradient of their sum, in float64."""
    slots = SlotModel(tiny_model(architecture))
    adapters = [random_adapter(slots.shapes, r, seed=k) for k, r in enumerate(RANKS)]
    slots.load(adapters, carried=carried_of(slots.shapes, carried), trainable=trainable)
    rows = [random_examples(3, seed=k) for k in range(first)]
    chosen = forced(way, monkeypatch)
    with slots.first_slots(first):
        parts = answer_losses(slots, collate(rows, pad_token_id=0))
        slots.accumulate_gradients(sum(part.sum() for part in parts))
    assert len(chosen) == len(slots.shapes), "every module was asked"
    return torch.cat(parts).detach(), slots.gradients.clone()


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"carried": "shared"},
        {"carried": "own"},
        {"trainable": ("lora_B",)},
        {"trainable": ("lora_A",), "carried": "shared"},
        {"first": 2, "carried": "own"},
    ],
    ids=str,
)
def test_losses_and_gradients_are_those_of_the_factors(architecture, case, monkeypatch):
    losses, gradients = results(architecture, "whole", monkeypatch, **case)
    wanted, by_factors = results(architecture, "factors", monkeypatch, **case)
    assert reference.relative_error(losses, wanted) < 1e-13
    assert reference.relative_error(gradients, by_factors) < 1e-12
    assert float(gradients.abs().max()) > 1e-3


def test_each_slot_trains_what_it_trains_alone(architecture, way):
    """Float64; alone a slot always goes through its factors."""
    slots = SlotModel(tiny_model(architecture))
    carried = random_adapter(slots.shapes, 6, seed=20)
    jobs = [
        train_job(random_adapter(slots.shapes, r, seed=k), f"c{k}", carried=carried)
        for k, r in enumerate(RANKS)
    ]
    rows = [random_examples(6 + k, seed=k) for k in range(3)]
    settings = TrainSettings(learning_rate=0.01, per_device_train_batch_size=2, max_steps=3)
    together = train(slots, jobs, rows, settings)
    asked = len(way)
    assert asked > 0
    for job, examples, result in zip(jobs, rows, together, strict=True):
        alone = train(slots, [job], [examples], settings)[0]
        assert reference.adapter_distance(result.adapter, alone.adapter) < 1e-9
        assert reference.adapter_distance(result.adapter, job.start.trained) > 1e-3
    assert len(way) == asked


def test_small_modules_are_taken_whole_and_large_ones_are_not():
    def whole(*case):
        low, built = low_rank_cost(*case)
        return built < low

    assert whole(512, 64, 64, 2) and whole(512, 64, 172, 8)
    assert not whole(512, 576, 1536, 16) and not whole(512, 4096, 4096, 64)
    assert not whole(512, 128, 384, 8) and whole(512, 128, 384, 8, 32), "carried factors cost too"
    assert not whole(1, 64, 64, 16), "a token at a time does not pay for the matrix"


@pytest.mark.parametrize("odd", ["alone", "dropout", "half", "learning base"])
def test_what_cannot_go_through_one_matrix_does_not(odd, monkeypatch):
    dtype = torch.bfloat16 if odd == "half" else torch.float32
    model = tiny_model("llama", dtype=dtype)
    slots, chosen = SlotModel(model), forced("whole", monkeypatch)
    count = 1 if odd == "alone" else 2
    starts = [random_adapter(slots.shapes, 2, seed=k, dtype=torch.float32) for k in range(count)]
    settings = TrainSettings(
        learning_rate=0.01,
        per_device_train_batch_size=2,
        max_steps=2,
        lora_dropout=0.1 if odd == "dropout" else 0.0,
    )
    if odd == "learning base":
        slots.load(starts, trainable=BOTH)
        for layer in slots.layers.values():
            layer.base.weight.requires_grad_()
        answer_losses(slots, collate([random_examples(2)] * 2, pad_token_id=0))
    else:
        calls = []
        own = layers._SlotLinear.apply
        monkeypatch.setattr(layers._SlotLinear, "apply", lambda *a: calls.append(1) or own(*a))
        jobs = [train_job(start, f"c{k}") for k, start in enumerate(starts)]
        assert all(r.adapter for r in train(slots, jobs, [random_examples(4)] * count, settings))
        # Only the probes before and after training are without dropout.
        passes = {"dropout": 2}.get(odd, 0)
        assert len(calls) == passes * len(slots.shapes)
        return
    assert not chosen
