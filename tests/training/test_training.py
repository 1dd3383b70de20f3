"""Local training: K slots are K separate runs, and one slot is a plain torch.optim loop."""

import math
from dataclasses import replace

import pytest
import torch

import reference
from builders import random_adapter, random_examples, tiny_model, train_job
from cohorts import EPOCHS, cohort, recipe, settings
from flexlora.data.collation import collate
from flexlora.training.layers import DropoutStream
from flexlora.training.local import answer_losses, learning_rate_at, num_steps, train
from flexlora.training.slots import SlotModel

BOTH = ("lora_A", "lora_B")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_k_slots_equal_k_separate_runs(kind, dropout, gradient_checkpointing):
    """Unequal ranks, alphas, rows, lengths and step counts (6, 10 and 2), carried factors.

    OPT is here because its MLP flattens rows and tokens into one axis.
    """
    slots = SlotModel(tiny_model(kind))
    jobs, rows = cohort(slots, carried=True)
    chosen = settings(lora_dropout=dropout, gradient_checkpointing=gradient_checkpointing)
    together = train(slots, jobs, rows, chosen)
    assert [result.steps for result in together] == [6, 10, 2]
    for job, examples, result in zip(jobs, rows, together, strict=True):
        (alone,) = train(slots, [job], [examples], chosen)
        assert reference.adapter_distance(result.adapter, alone.adapter) < 1e-9
        assert reference.adapter_distance(result.adapter, job.start.trained) > 1e-2
        for name in ("train_loss", "loss_before", "loss_after"):
            assert getattr(result, name) == pytest.approx(getattr(alone, name), rel=1e-9), name
        assert (result.steps, result.tokens) == (alone.steps, alone.tokens)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"weight_decay": 0.1, "lr_scheduler_type": "cosine"},
        {"optim": "sgd", "learning_rate": 0.5, "weight_decay": 0.01},
        {"max_grad_norm": 0.05},
        {"max_grad_norm": 0.0, "lr_scheduler_type": "constant"},
        {"gradient_accumulation_steps": 3},
    ],
    ids=str,
)
def test_one_slot_is_a_plain_torch_loop_over_merged_weights(changes):
    """The oracle: rows one by one and unpadded, dense weights, torch.optim, clip_grad_norm_."""
    slots, plain = SlotModel(tiny_model("llama")), tiny_model("llama")
    jobs, rows = cohort(slots, carried=True)
    chosen = settings(**changes)
    results = train(slots, jobs[:2], rows[:2], chosen)
    for job, examples, result in zip(jobs, rows, results, strict=False):
        expected = reference.train_one_client(
            plain,
            job.start.trained,
            examples,
            recipe(job, examples, chosen),
            carried=job.start.carried,
        )
        assert reference.adapter_distance(result.adapter, expected) < 1e-9


@pytest.mark.parametrize("trainable", [("lora_B",), ("lora_A",)])
def test_factors_that_are_not_trainable_stay_bit_by_bit(llama, trainable):
    """FFA-LoRA trains lora_B alone; the oracle does too."""
    slots, plain = SlotModel(llama), tiny_model("llama")
    jobs, rows = cohort(slots, trainable=trainable)
    results = train(slots, jobs, rows, EPOCHS)
    frozen = ({*BOTH} - {*trainable}).pop()
    for job, examples, result in zip(jobs, rows, results, strict=True):
        for name, factors in result.adapter.items():
            assert torch.equal(getattr(factors, frozen), getattr(job.start.trained[name], frozen))
        expected = reference.train_one_client(
            plain,
            job.start.trained,
            examples,
            recipe(job, examples, EPOCHS),
            trainable=trainable,
        )
        assert reference.adapter_distance(result.adapter, expected) < 1e-9


def test_results_come_in_the_order_of_the_jobs_and_name_their_start(llama):
    slots = SlotModel(llama)
    jobs, rows = cohort(slots)
    results = train(slots, jobs, rows, EPOCHS)
    assert [r.client_id for r in results] == ["client_2", "client_5", "client_3"]
    assert [r.rank_class for r in results] == ["rank_2", "rank_5", "rank_3"]
    assert [r.digest for r in results] == [job.start.digest for job in jobs]
    assert [r.num_examples for r in results] == [5, 9, 2]
    assert {r.base_round for r in results} == {1}
    for job, result in zip(jobs, results, strict=True):
        for name, factors in result.adapter.items():
            sent = job.start.trained[name]
            assert factors.rank == sent.rank and factors.scaling == sent.scaling


def gradients(slots, adapters, batch, dropout=0.0):
    slots.load(adapters, trainable=BOTH)
    streams = [
        DropoutStream(seed=40 + k, rows=rows, length=length, padded_length=batch.input_ids.shape[1])
        for k, (rows, length) in enumerate(
            zip(batch.rows_per_slot, batch.lengths_per_slot, strict=True)
        )
    ]
    slots.set_dropout(dropout, streams if dropout else ())
    slots.accumulate_gradients(sum(part.mean() for part in answer_losses(slots, batch)))
    return slots.gradients.clone()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_of_a_slot_do_not_move_when_another_slots_rows_change(llama, dropout):
    slots = SlotModel(llama)
    adapters = [random_adapter(slots.shapes, rank, seed=rank) for rank in (2, 6)]
    mine = random_examples(3, seed=1)
    first, same_shape, wider = (
        gradients(slots, adapters, collate([mine, other], pad_token_id=0), dropout)
        for other in (
            random_examples(3, seed=1)[::-1],
            random_examples(3, seed=1)[:1] * 3,
            random_examples(5, seed=3, shortest=20, longest=30),
        )
    )
    assert not torch.equal(first[1], same_shape[1]), "the other slot's rows did not change"
    torch.testing.assert_close(same_shape[0], first[0], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(wider[0], first[0], rtol=1e-9, atol=1e-14)


def test_padding_of_a_slot_of_lower_rank_stays_zero(llama):
    """Rank 2 in a buffer as wide as rank 6: its tail has no gradient and never moves."""
    slots = SlotModel(llama)
    adapters = [random_adapter(slots.shapes, rank, seed=rank) for rank in (2, 6)]
    batch = collate([random_examples(3, seed=k) for k in range(2)], pad_token_id=0)
    grads = gradients(slots, adapters, batch)
    layer = next(iter(slots.layers.values()))
    assert torch.count_nonzero(layer.trained.A[0, 2:]) == 0
    own = sum(2 * sum(shape) for shape in slots.shapes.values())
    assert torch.count_nonzero(grads[0]) == own


def test_a_slot_that_diverges_leaves_the_others_alone(llama):
    slots = SlotModel(llama)
    jobs, rows = cohort(slots)
    expected = train(slots, jobs[:2], rows[:2], EPOCHS)
    broken = train_job(
        jobs[2].start.trained.map(lambda t: torch.full_like(t, math.inf)), "client_3"
    )
    results = train(slots, [*jobs[:2], broken], rows, EPOCHS)
    assert results[2].adapter is None
    assert "the training loss is not finite" in results[2].cause
    for result, alone in zip(results[:2], expected, strict=True):
        assert result.cause == ""
        assert reference.adapter_distance(result.adapter, alone.adapter) < 1e-9


def test_gradient_accumulation_equals_the_larger_batch(llama):
    """Also with a last step of one row, and answers of unequal length."""
    slots = SlotModel(llama)
    jobs, rows = cohort(slots)
    large = train(slots, jobs, rows, settings(per_device_train_batch_size=4))
    small = train(
        slots, jobs, rows, settings(per_device_train_batch_size=1, gradient_accumulation_steps=4)
    )
    for one, other in zip(large, small, strict=True):
        assert one.steps == other.steps and one.tokens == other.tokens
        assert one.train_loss == pytest.approx(other.train_loss, rel=1e-9)
        assert reference.adapter_distance(one.adapter, other.adapter) < 1e-9


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox", "opt"])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_the_base_is_untouched_and_its_own_dropout_sleeps(kind, gradient_checkpointing):
    """GPT-2 has dropout 0.1 in modules; OPT's layer draws 0.3 under the layer's training flag."""
    model, plain = tiny_model(kind), tiny_model(kind)
    slots = SlotModel(model)
    jobs, rows = cohort(slots)
    chosen = settings(gradient_checkpointing=gradient_checkpointing)
    (result,) = train(slots, jobs[:1], rows[:1], chosen)
    slots.remove()
    assert not any(module.training for module in model.modules())
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert not any(parameter.requires_grad for parameter in model.parameters())
    expected = reference.train_one_client(
        plain, jobs[0].start.trained, rows[0], recipe(jobs[0], rows[0], chosen)
    )
    assert reference.adapter_distance(result.adapter, expected) < 1e-9


def test_checkpointing_does_recompute(llama, monkeypatch):
    """Otherwise the cases above would show nothing: each layer runs again in the backward pass."""
    slots = SlotModel(llama)
    calls = []
    layer = slots.layers["model.layers.1.mlp.up_proj"]
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda x: (calls.append(1), forward(x))[1])
    jobs, rows = cohort(slots)
    counts = []
    for enabled in (False, True):
        calls.clear()
        train(slots, jobs, rows, settings(max_steps=2, gradient_checkpointing=enabled))
        counts.append(len(calls))
    assert counts == [2 + 1, 2 * 2 + 1]  # and once for the loss after the last step


def test_dropout_is_drawn_anew_per_step_round_client_and_module(llama):
    """The same seed gives the same result; another round, client or dropout another."""
    slots = SlotModel(llama)
    adapter = random_adapter(slots.shapes, 3)
    rows = random_examples(2)

    def run(client_id="a", server_round=1, dropout=0.4, seed=0):
        job = train_job(adapter, client_id, server_round=server_round)
        chosen = settings(
            lora_dropout=dropout,
            seed=seed,
            lr_scheduler_type="constant",
            max_steps=1,
            per_device_train_batch_size=8,  # all rows in the step, so that only masks differ
        )
        (result,) = train(slots, [job], [rows], chosen)
        return result.adapter

    assert run().digest() == run().digest()
    for other in (run(client_id="b"), run(server_round=2), run(seed=1), run(dropout=0.0)):
        assert reference.adapter_distance(other, run()) > 1e-6


def test_the_loss_is_the_cross_entropy_of_the_answer_tokens_alone(llama):
    slots, plain = SlotModel(llama), tiny_model("llama")
    rows = [random_examples(3, seed=1), random_examples(1, seed=2)]
    batch = collate(rows, pad_token_id=0)
    got = answer_losses(slots, batch)
    for slot, examples in zip(got, rows, strict=True):
        by_hand = []
        for row in examples:
            logits = reference.logits_of(plain, [], row.input_ids)
            for position in range(row.prompt_length, len(row.input_ids)):
                scores = logits[position - 1]
                token = row.input_ids[position]
                by_hand.append(float(torch.logsumexp(scores, 0) - scores[token]))
        torch.testing.assert_close(
            slot, torch.tensor(by_hand, dtype=torch.float64), rtol=1e-9, atol=1e-10
        )


def test_prompt_labels_and_padding_change_nothing(llama):
    """Completion-only: nothing is asked of the prompt, and the padding is not read."""
    slots = SlotModel(llama)
    rows = [random_examples(3, seed=1)]
    batch = collate(rows, pad_token_id=0)
    assert int((batch.labels != -100).sum()) == sum(
        len(row.input_ids) - row.prompt_length for row in rows[0]
    )
    other_padding = replace(
        batch,
        input_ids=torch.where(batch.attention_mask == 0, torch.tensor(9), batch.input_ids),
    )
    (one,), (other,) = answer_losses(slots, batch), answer_losses(slots, other_padding)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_the_reported_losses_are_what_they_say(llama):
    """Before any step and after the last on the first rows; the mean over the steps between."""
    slots, plain = SlotModel(llama), tiny_model("llama")
    jobs, rows = cohort(slots)
    chosen = settings(max_steps=3)
    result = train(slots, jobs, rows, chosen)[0]
    first = recipe(jobs[0], rows[0], chosen).batches[0]

    def mean_loss(adapter):
        chosen_rows = [rows[0][i] for i in first]
        tokens = sum(len(row.input_ids) - row.prompt_length for row in chosen_rows)
        with torch.no_grad():
            total = sum(
                reference.answer_loss(reference.logits_of(plain, [adapter], row.input_ids), row)
                for row in chosen_rows
            )
        return float(total / tokens)

    assert result.loss_before == pytest.approx(mean_loss(jobs[0].start.trained), rel=1e-9)
    assert result.loss_after == pytest.approx(mean_loss(result.adapter), rel=1e-9)
    assert result.loss_after < result.loss_before


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1.0] * 6),
        ("linear", [1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("cosine", [0.5 * (1 + math.cos(math.pi * i / 6)) for i in range(6)]),
    ],
)
def test_the_schedule_runs_once_across_all_rounds(llama, schedule, expected):
    chosen = settings(learning_rate=0.1, lr_scheduler_type=schedule)
    adapter = random_adapter({"w": (4, 4)})
    rates = [
        learning_rate_at(chosen, train_job(adapter, server_round=r), step, 2)
        for r in (1, 2, 3)
        for step in (0, 1)
    ]
    assert rates == pytest.approx([0.1 * factor for factor in expected])


def test_step_counts():
    assert num_steps(9, settings(max_steps=7)) == 7
    assert num_steps(9, settings()) == 2 * 5
    assert num_steps(9, settings(gradient_accumulation_steps=2)) == 2 * 3
    assert num_steps(1, settings(per_device_train_batch_size=64)) == 2


def test_jobs_that_cannot_share_a_cohort_are_refused(llama):
    slots = SlotModel(llama)
    jobs, rows = cohort(slots)
    with pytest.raises(ValueError, match="every job needs at least one example"):
        train(slots, jobs, [rows[0], [], rows[2]], EPOCHS)
    with pytest.raises(ValueError, match="every job needs at least one example"):
        train(slots, [], [], EPOCHS)
    other = train_job(jobs[1].start.trained, "x", trainable=("lora_B",))
    with pytest.raises(ValueError, match="must train alike"):
        train(slots, [jobs[0], other], rows[:2], EPOCHS)
