"""DP-SGD in a cohort: a slow loop's steps, one slot's noise, Poisson rows, withheld losses."""

import math
from dataclasses import replace

import pytest
import torch

import reference
from builders import random_adapter, random_examples, tiny_model, train_job
from cohorts import cohort, recipe, settings
from flexlora import UserError, load_adapter, save_adapter
from flexlora.training.local import num_steps, train
from flexlora.training.row_privacy import RowPrivacy
from flexlora.training.schedule import sample_share
from flexlora.training.slots import SlotModel

BOTH = ("lora_A", "lora_B")
PRIVATE = {"row_clip": 0.5, "row_noise": 0.8, "reproducible": True}


def private(**changes):
    return settings(**{**PRIVATE, **changes})


def privacy_of(job, rows, chosen, slots):
    """The rows and the noise of one client, alone."""
    slots.load([job.start.trained], trainable=job.start.trainable)
    return RowPrivacy.of(chosen, [job], [len(rows)], slots.live_numbers())


def noises(job, rows, chosen, slots):
    """The noise of every step as a list of tensors, in the order of the adapter's factors."""
    drawn = privacy_of(job, rows, chosen, slots)
    deviation, steps = chosen.row_clip * chosen.row_noise, []
    for _ in range(num_steps(len(rows), chosen)):
        flat = deviation * drawn._normal(0, slots.parameters.shape[1], slots.parameters)
        parts = {}
        for key, span in slots._spans.items():
            factors = job.start.trained[key[0]]
            parts[key] = flat[span].view(getattr(factors, key[1]).shape)
        wanted = [(name, label) for name in job.start.trained for label in job.start.trainable]
        steps.append([parts[key] for key in wanted])
    return steps


@pytest.mark.parametrize(
    "changes",
    [
        {"optim": "sgd", "learning_rate": 0.3, "max_grad_norm": 0.0},
        {"gradient_accumulation_steps": 2, "weight_decay": 0.1},
    ],
    ids=str,
)
def test_steps_are_those_of_a_slow_loop(changes):
    """Rows one by one and unpadded, clipped in Python; the same rows and noise."""
    slots, plain = SlotModel(tiny_model("llama")), tiny_model("llama")
    jobs, rows = cohort(slots, carried=True)
    chosen = private(**changes)
    results = train(slots, jobs, rows, chosen)
    for job, examples, result in zip(jobs[:1], rows[:1], results, strict=False):
        drawn = privacy_of(job, examples, chosen, slots)
        batches = drawn.plan(0, num_steps(len(examples), chosen))
        divisor = sample_share(len(examples), chosen) * len(examples)
        expected = reference.train_one_client(
            plain,
            job.start.trained,
            examples,
            replace(recipe(job, examples, chosen), batches=batches),
            carried=job.start.carried,
            private=(chosen.row_clip, divisor, noises(job, examples, chosen, slots)),
        )
        assert reference.adapter_distance(result.adapter, expected) < 1e-9


@pytest.mark.parametrize(("kind", "trainable"), [("llama", BOTH), ("opt", ("lora_B",))])
def test_a_slot_has_its_rows_and_its_noise_alone_and_in_a_cohort(kind, trainable):
    """Unequal ranks, rows and numbers of steps; a pass of any width."""
    slots = SlotModel(tiny_model(kind))
    jobs, rows = cohort(slots, trainable=trainable)
    together = train(slots, jobs, rows, private())
    for job, examples, result in zip(jobs, rows, together, strict=True):
        (alone,) = train(slots, [job], [examples], private(micro_batch_size=1))
        assert reference.adapter_distance(result.adapter, alone.adapter) < 1e-9
        assert reference.adapter_distance(result.adapter, job.start.trained) > 1e-2


def test_noise_does_not_come_from_the_runs_seed_unless_that_is_asked_for(llama):
    slots = SlotModel(llama)
    jobs, rows = cohort(slots)

    def trained(**changes):
        return train(slots, jobs[2:], rows[2:], private(**changes))[0].adapter

    assert trained().digest() == trained().digest()
    assert trained().digest() != trained(seed=4).digest()
    assert trained(reproducible=False).digest() != trained(reproducible=False).digest()


@pytest.mark.parametrize(("noise", "clip"), [(0.5, 2.0), (3.0, 0.25)])
def test_the_noise_has_the_deviation_that_is_accounted(llama, noise, clip):
    """One step of SGD from rows without any influence: a wrong factor of 2 or of q n fails."""
    slots = SlotModel(llama)
    job = train_job(random_adapter(slots.shapes, 8, seed=1))
    rows = random_examples(10, seed=2)
    chosen = private(
        optim="sgd",
        learning_rate=1.0,
        max_steps=1,
        max_grad_norm=0.0,
        row_clip=clip,
        row_noise=noise,
        lr_scheduler_type="constant",
    )
    start = job.start.trained
    with_rows = train(slots, [job], [rows], chosen)[0].adapter
    change = torch.cat([(with_rows[n].lora_B - start[n].lora_B).flatten() for n in start])
    expected = noise * clip / 2  # q n = 2 rows
    # The rows add at most `clip` in norm each, over some 4,000 numbers.
    assert float(change.std()) == pytest.approx(expected, rel=0.06)


def test_rows_are_drawn_one_by_one_and_some_steps_have_none():
    count, chosen = 40, private(per_device_train_batch_size=2)
    drawn = RowPrivacy(settings=chosen, seeds=[5], num_rows=[count], live=[])
    plan = drawn.plan(0, 4000)
    sizes = torch.tensor([float(len(rows)) for rows in plan])
    share = sample_share(count, chosen)
    assert share == 0.05
    assert float(sizes.mean()) == pytest.approx(count * share, rel=0.05)
    assert float(sizes.var()) == pytest.approx(count * share * (1 - share), rel=0.1)
    empty = float((sizes == 0).double().mean())
    assert empty == pytest.approx((1 - share) ** count, abs=0.03)
    taken = torch.zeros(count)
    for rows in plan:
        assert len(set(rows)) == len(rows)
        taken[rows] += 1
    assert float((taken / 4000 - share).abs().max()) < 5 * math.sqrt(share / 4000)
    assert sample_share(3, private(per_device_train_batch_size=8)) == 1.0


def test_a_step_without_rows_is_noise(llama):
    slots = SlotModel(llama)
    job, rows = train_job(random_adapter(slots.shapes, 2, seed=1)), random_examples(60, seed=2)
    chosen = private(per_device_train_batch_size=1, max_steps=1, optim="sgd", learning_rate=1.0)
    seed = next(
        seed
        for seed in range(100)
        if privacy_of(job, rows, private(**{**dict(chosen), "seed": seed}), slots).plan(0, 1)
        == [[]]
    )
    (result,) = train(slots, [job], [rows], private(**{**dict(chosen), "seed": seed}))
    assert reference.adapter_distance(result.adapter, job.start.trained) > 1e-3


def test_nothing_about_the_rows_is_said(llama):
    slots = SlotModel(llama)
    jobs, rows = cohort(slots)
    for result in train(slots, jobs[2:], rows[2:], private()):
        assert result.withheld and not result.cause
        for name in ("train_loss", "loss_before", "loss_after"):
            assert math.isnan(getattr(result, name))
        assert result.tokens == 0
    assert not train(slots, jobs[2:], rows[2:], settings())[0].withheld


def test_what_lets_a_row_touch_others_is_refused(llama):
    slots = SlotModel(llama)
    jobs, rows = cohort(slots)
    with pytest.raises(UserError, match=r"lora.dropout is 0.1 with clipped rows: a row's mask"):
        train(slots, jobs, rows, private(lora_dropout=0.1))
    aligned = [
        replace(job, start=replace(job.start, local=replace(job.start.local, gradient_batches=1)))
        for job in jobs
    ]
    with pytest.raises(UserError, match="aligns lora_A with the gradient of the rows"):
        train(slots, aligned, rows, private())
    assert slots.num_slots == 0


def test_penalties_and_pulls_that_no_row_decides_go_on(llama):
    """FedProx and HetLoRA's regulariser change the steps, after the noise."""
    slots = SlotModel(llama)
    jobs, rows = (part[2:] for part in cohort(slots))
    plain = train(slots, jobs, rows, private())
    pulled = train(slots, jobs, rows, private(proximal_mu=5.0))
    penalised = [
        replace(
            job,
            start=replace(
                job.start,
                local=replace(job.start.local, prune_penalty=0.5, prune_factor=0.5),
            ),
        )
        for job in jobs
    ]
    others = train(slots, penalised, rows, private())
    for k, result in enumerate(plain):
        assert reference.adapter_distance(pulled[k].adapter, result.adapter) > 1e-3
        assert others[k].adapter.digest() != result.adapter.digest()


def test_a_private_adapter_on_disk_gives_the_same_logits(llama, tmp_path):
    """In our loader and in PEFT: no wrapped module, no renamed key."""
    import peft

    slots = SlotModel(llama)
    jobs, rows = cohort(slots)
    adapter = train(slots, jobs[2:], rows[2:], private())[0].adapter
    save_adapter(adapter, tmp_path / "adapter", base="base")
    loaded = load_adapter(tmp_path / "adapter")
    assert reference.adapter_distance(loaded, adapter) < 1e-6  # float32 on disk
    ids = torch.tensor([rows[2][0].input_ids])
    slots.load([adapter])
    with torch.no_grad():
        ours = slots.model(input_ids=ids, use_cache=False).logits
    theirs = peft.PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "adapter"))
    with torch.no_grad():
        logits = theirs(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(logits, ours, rtol=0, atol=1e-5)
    plain = tiny_model("llama")(input_ids=ids, use_cache=False).logits
    assert float((ours - plain).abs().max()) > 1e-3
