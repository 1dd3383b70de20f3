"""What a method asks of its clients beside plain steps, each against a loop that spells it out.

FedProx's pull, HetLoRA's regulariser and pruning, Fed-PLoRA's drawn terms.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import reference
from builders import random_adapter, random_examples, tiny_model, train_job
from cohorts import EPOCHS, cohort, recipe, settings
from flexlora.aggregation.engine.starts import LocalPlan
from flexlora.lora.ranks import RankClass
from flexlora.training.local import train
from flexlora.training.slots import SlotModel

# --- FedProx -----------------------------------------------------------------------------------


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_fedprox_is_the_penalty_in_the_loss(optim, max_grad_norm):
    """``mu / 2 |factors - start|^2`` by autograd, in front of the clipping."""
    slots, plain = SlotModel(tiny_model("llama")), tiny_model("llama")
    jobs, rows = cohort(slots, carried=True)
    chosen = settings(
        proximal_mu=0.7,
        optim=optim,
        max_grad_norm=max_grad_norm,
        learning_rate=0.5 if optim == "sgd" else 0.02,
    )
    free = train(slots, jobs, rows, chosen.model_copy(update={"proximal_mu": 0.0}))
    for job, examples, result, other in zip(
        jobs, rows, train(slots, jobs, rows, chosen), free, strict=True
    ):
        expected = reference.train_one_client(
            plain,
            job.start.trained,
            examples,
            recipe(job, examples, chosen),
            carried=job.start.carried,
            penalty=reference.pull(job.start.trained, 0.7),
        )
        assert reference.adapter_distance(result.adapter, expected) < 1e-9
        assert reference.adapter_distance(result.adapter, other.adapter) > 1e-5


# --- HetLoRA -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0.5, 0.75, 0.99])
def test_the_tail_norms_and_their_gradient_are_autograds_on_the_formula(kept):
    """Ranks 2, 5 and 3 in one padded buffer; where a tail is empty its norm is 0."""
    slots = SlotModel(tiny_model("llama"))
    adapters = [random_adapter(slots.shapes, rank, seed=rank) for rank in (2, 5, 3, 1)]
    slots.load(adapters, trainable=("lora_A", "lora_B"))
    norms = slots.tail_norms(kept)
    slots.accumulate_gradients(norms.sum())
    for k, adapter in enumerate(adapters):
        leaves = adapter.map(lambda t: t.clone().requires_grad_())
        expected = reference.tail_product(leaves, kept)
        if not isinstance(expected, torch.Tensor):
            assert float(norms[k]) < 1e-20 and not slots.gradients[k].any()
            continue
        torch.testing.assert_close(norms[k], expected, rtol=1e-12, atol=0)
        expected.backward()
        for name in slots.layers:
            rank = adapter[name].rank
            for label in ("lora_A", "lora_B"):
                view = gradient_view(slots, name, label)[k]
                own = view[:rank] if label == "lora_A" else view[:, :rank]
                wanted = getattr(leaves[name], label).grad
                torch.testing.assert_close(own, wanted, rtol=1e-11, atol=1e-14)


def gradient_view(slots, name, label):
    """The part of the flat gradient buffer that belongs to one factor of one module."""
    leaf = getattr(slots.layers[name].trained, label[-1])
    offset, (slot_count, rows, columns) = leaf.storage_offset(), leaf.shape
    span = slots.gradients[:, offset : offset + rows * columns]
    return span.reshape(slot_count, rows, columns)


@pytest.mark.parametrize("gradient_accumulation_steps", [1, 3])
def test_the_regulariser_trains_as_the_explicit_formula_in_the_loss(gradient_accumulation_steps):
    """Once a step, however many passes a step has; nothing is pruned, since no tail shrinks."""
    slots, plain = SlotModel(tiny_model("llama")), tiny_model("llama")
    plan = LocalPlan(prune_penalty=0.02, prune_factor=0.5)
    jobs, rows = cohort(slots, local=plan)
    chosen = settings(gradient_accumulation_steps=gradient_accumulation_steps)
    for job, examples, result in zip(jobs, rows, train(slots, jobs, rows, chosen), strict=True):
        expected = reference.train_one_client(
            plain,
            job.start.trained,
            examples,
            recipe(job, examples, chosen),
            penalty=lambda adapter: 0.02 * reference.tail_product(adapter, 0.5),
        )
        assert same_terms(result.adapter, expected, 0.5)


def same_terms(got, expected, kept):
    """Whether ``got`` is ``expected`` whole where its tail grew, else without its tail."""
    for name, factors in got.items():
        whole = expected[name]
        own = whole.terms(range(factors.rank))
        assert factors.rank in (whole.rank, max(1, int(kept * whole.rank)))
        assert factors.scaling == pytest.approx(whole.scaling, rel=1e-14)
        assert reference.relative_error(factors.delta_weight(), own.delta_weight()) < 1e-8
    return True


@pytest.mark.parametrize("penalty", [0.0, 1e-3, 2.0])
def test_a_tail_is_dropped_exactly_when_its_norm_fell(penalty):
    """The norms of the slow training decide; with a strong penalty all fall."""
    slots, plain = SlotModel(tiny_model("llama")), tiny_model("llama")
    jobs, rows = cohort(slots, local=LocalPlan(prune_penalty=penalty, prune_factor=0.75))
    results = train(slots, jobs, rows, settings(learning_rate=0.005))
    fell = []
    for job, examples, result in zip(jobs, rows, results, strict=True):
        expected = reference.train_one_client(
            plain,
            job.start.trained,
            examples,
            recipe(job, examples, settings(learning_rate=0.005)),
            penalty=lambda adapter: penalty * reference.tail_product(adapter, 0.75),
        )
        before = reference.tail_product(job.start.trained, 0.75)
        after = reference.tail_product(expected, 0.75)
        fell.append(bool(after < before))
        assert same_terms(result.adapter, expected, 0.75)
        for name, factors in result.adapter.items():
            sent = job.start.trained[name].rank
            assert factors.rank == (max(1, int(0.75 * sent)) if fell[-1] else sent)
    assert all(fell) if penalty == 2.0 else not all(fell)


def test_a_client_without_a_tail_keeps_its_rank(llama):
    """Rank 1 has nothing to drop."""
    slots = SlotModel(llama)
    plan = LocalPlan(prune_penalty=1.0, prune_factor=0.5)
    job = train_job(random_adapter(slots.shapes, 1), local=plan)
    (result,) = train(slots, [job], [random_examples(4)], EPOCHS)
    assert {factors.rank for factors in result.adapter.values()} == {1}


# --- Fed-PLoRA ---------------------------------------------------------------------------------


def drawing_job(shapes, client_id="c0", server_round=1, rank=2, carried=None):
    job = train_job(
        random_adapter(shapes, 6, alpha=[9.0, 4.0], seed=4),
        client_id,
        carried=carried,
        server_round=server_round,
        local=LocalPlan(select=True, select_seed=7),
    )
    start = replace(job.start, rank_class=RankClass(name=f"rank_{rank}", rank=rank)).sealed()
    return replace(job, start=start)


@pytest.mark.parametrize("beside", [False, True])
def test_drawn_and_carried_terms_are_all_that_was_sent(llama, beside):
    slots = SlotModel(llama)
    more = random_adapter(slots.shapes, 3, seed=8) if beside else None
    sent = drawing_job(slots.shapes, carried=more).start
    own = sent.for_client("c0")
    for name, factors in sent.trained.items():
        drawn = sent.drawn_terms("c0")[name]
        assert len(drawn) == own.trained[name].rank == 2 and drawn == sorted(set(drawn))
        assert torch.equal(own.trained[name].lora_A, factors.lora_A[drawn])
        assert torch.equal(own.trained[name].lora_B, factors.lora_B[:, drawn])
        assert own.trained[name].scaling == pytest.approx(factors.scaling, rel=1e-15)
        whole = factors.delta_weight() + (more.delta_weight(name) if more else 0.0)
        got = own.trained.delta_weight(name) + own.carried.delta_weight(name)
        assert reference.relative_error(got, whole) < 1e-14
    slots.load([own.trained], carried=[own.carried])
    batch = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        split = slots.model(input_ids=batch).logits
        slots.load([sent.trained], carried=[more])
        together = slots.model(input_ids=batch).logits
        slots.clear()
        bare = slots.model(input_ids=batch).logits
    torch.testing.assert_close(split, together, rtol=0, atol=1e-11)
    assert float((together - bare).abs().max()) > 0.1


def test_terms_are_drawn_anew_by_client_and_round_and_all_get_their_turn(llama):
    slots = SlotModel(llama)
    name = next(iter(slots.shapes))
    drawn = {
        (client, at): tuple(drawing_job(slots.shapes, client, at).start.drawn_terms(client)[name])
        for client in ("a", "b", "c")
        for at in range(1, 9)
    }
    assert len({drawn["a", at] for at in range(1, 9)}) > 1
    assert len({drawn[client, 1] for client in ("a", "b", "c")}) > 1
    assert {term for terms in drawn.values() for term in terms} == set(range(6))
    again = drawing_job(slots.shapes, "a", 1).start
    assert tuple(again.drawn_terms("a")[name]) == drawn["a", 1]


def test_a_drawn_client_trains_its_terms_beside_the_others(llama):
    """Against the slow loop with the other terms in the weights; K slots draw each their own."""
    slots, plain = SlotModel(llama), tiny_model("llama")
    jobs = [drawing_job(slots.shapes, f"c{k}", rank=k + 1) for k in range(3)]
    jobs[2] = drawing_job(slots.shapes, "c2", rank=6)  # draws all: nothing is left to carry
    rows = [random_examples(n, seed=n) for n in (5, 9, 2)]
    for job, examples, result in zip(jobs, rows, train(slots, jobs, rows, EPOCHS), strict=True):
        own = job.start.for_client(job.client_id)
        assert (own.carried is None) == (job.client_id == "c2")
        expected = reference.train_one_client(
            plain, own.trained, examples, recipe(job, examples, EPOCHS), carried=own.carried
        )
        assert reference.adapter_distance(result.adapter, expected) < 1e-9
        assert result.digest == job.start.digest


def test_without_a_draw_a_clients_start_is_its_classs(llama):
    slots = SlotModel(llama)
    start = train_job(random_adapter(slots.shapes, 3)).start
    assert start.for_client("anybody") is start
