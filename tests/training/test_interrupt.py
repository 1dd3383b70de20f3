"""A training or an evaluation that is asked to end does so before its next pass."""

from __future__ import annotations

import pytest
import torch

import reference
from builders import tiny_model
from cohorts import EPOCHS, cohort, settings
from flexlora.errors import UserError
from flexlora.training.local import train
from flexlora.training.slots import SlotModel
from flexlora.wire.jobs import EvalJob
from trainers import run_config, start_of


def after(passes):
    """An interrupt that lets so many passes be, and counts how often it is asked."""

    def interrupt():
        interrupt.asked += 1
        return "time is up." if interrupt.asked > passes else ""

    interrupt.asked = 0
    return interrupt


@pytest.mark.parametrize(
    ("changes", "passes", "steps"),
    [
        ({}, 0, 0),
        ({}, 3, 3),
        ({"micro_batch_size": 1}, 8, 3),  # two to measure the loss, two a step
        ({"lora_dropout": 0.1}, 4, 3),  # one to measure the loss
    ],
)
def test_a_training_ends_before_its_next_pass(llama, changes, passes, steps):
    slots = SlotModel(llama)
    jobs, rows = cohort(slots)
    chosen = settings(max_steps=5, per_device_train_batch_size=2, **changes)
    interrupt = after(passes)
    words = f"ended after {steps} of 5 steps, which do not count: time is up"
    with pytest.raises(UserError, match=words):
        train(slots, jobs[:1], rows[:1], chosen, interrupt=interrupt)
    assert interrupt.asked == passes + 1
    ids = torch.arange(6)[None]
    bare = SlotModel(tiny_model("llama"))
    assert torch.equal(slots.model(ids).logits, bare.model(ids).logits)  # the slots are cleared


def test_one_that_is_never_told_to_end_is_the_same_training(llama):
    slots = SlotModel(llama)
    jobs, rows = cohort(slots)
    interrupt = after(10**9)
    for plain, asked in zip(
        train(slots, jobs, rows, EPOCHS),
        train(slots, jobs, rows, EPOCHS, interrupt=interrupt),
        strict=True,
    ):
        assert reference.adapter_distance(plain.adapter, asked.adapter) == 0.0
        assert plain.loss_after == asked.loss_after
    assert interrupt.asked > 10


@pytest.mark.parametrize("generate", [False, True])
def test_an_evaluation_ends_between_passes_and_between_tokens(worker, generate):
    config = run_config()
    adapter = start_of(config, rank=2).trained
    job = EvalJob(
        client_id=worker.client_ids[0],
        server_round=1,
        adapters={"rank_2": adapter},
        generate=generate,
    )
    (plain,) = worker.evaluate([job])
    interrupt = after(10**9)
    with worker.interrupted_by(interrupt):
        assert worker.evaluate([job]) == [plain] and plain.cause == ""
    assert interrupt.asked >= (3 if generate else 1)
    with worker.interrupted_by(after(interrupt.asked - 1)):
        (ended,) = worker.evaluate([job])
    assert ended.scores == {} and ended.cause == "the evaluation is ended: time is up."
    assert worker.evaluate([job]) == [plain]
