"""What a method asks of its clients beside plain steps, each against a loop that spells it out.

Restarts, FedProx's pull, HetLoRA's regulariser and pruning, Fed-PLoRA's drawn terms.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import reference
from builders import random_adapter, random_examples, tiny_model, train_job
from cohorts import EPOCHS, cohort, recipe, settings
from flexlora.aggregation.engine.starts import LocalPlan
from flexlora.algebra.linalg import live_rows
from flexlora.data.collation import batch_plan
from flexlora.lora.adapters import Adapter
from flexlora.lora.ranks import RankClass
from flexlora.seeds import derive_seed, generator
from flexlora.training.local import train
from flexlora.training.optim import SlotOptimizer
from flexlora.training.slots import SlotModel, find_targets


def fresh_start(job, phase, seed):
    """Random ``lora_A`` by (seed, round, client, phase, module), zero ``lora_B``."""
    own = derive_seed(seed, "restart", job.server_round, job.client_id, phase)
    modules = {}
    for name, factors in job.start.trained.items():
        rows = live_rows(factors.rank, factors.in_features, generator(own, "live", name))
        B = torch.zeros_like(factors.lora_B)
        modules[name] = replace(factors, lora_A=rows.to(factors.lora_A), lora_B=B)
    return Adapter(modules)


def expected_phases(model, job, rows, chosen):
    """The slow version of a round with restarts: what each phase trained, one after another."""
    restarts = job.start.local.restarts
    fresh = [fresh_start(job, phase, chosen.seed) for phase in range(1, restarts + 1)]
    return reference.train_in_phases(
        model,
        [job.start.trained, *fresh],
        rows,
        recipe(job, rows, chosen),
        carried=job.start.carried,
        mu=chosen.proximal_mu,
    )


# --- restarts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("restarts", [1, 2])
@pytest.mark.parametrize("changes", [{}, {"proximal_mu": 0.3}, {"optim": "sgd"}], ids=str)
def test_restarts_are_phases_with_the_earlier_ones_frozen_beside(restarts, changes):
    """6, 10 and 2 steps in one cohort, so that no two clients restart at the same step.

    With 2 steps in 3 phases the first is empty: it keeps what was sent.
    """
    slots, plain = SlotModel(tiny_model("llama")), tiny_model("llama")
    jobs, rows = cohort(slots, carried=True, local=LocalPlan(restarts=restarts))
    chosen = settings(**changes)
    together = train(slots, jobs, rows, chosen)
    for job, examples, result in zip(jobs, rows, together, strict=True):
        (alone,) = train(slots, [job], [examples], chosen)
        phases = expected_phases(plain, job, examples, chosen)
        assert reference.adapter_distance(result.adapter, alone.adapter) < 1e-9
        assert reference.adapter_distance(result.adapter, reference.stacked(phases)) < 1e-9
        for name, factors in result.adapter.items():
            sent = job.start.trained[name]
            assert factors.rank == (1 + restarts) * sent.rank
            assert factors.scaling == pytest.approx(sent.scaling, rel=1e-14)
            assert factors.rslora == sent.rslora
            for phase, part in enumerate(phases):
                own = factors.terms(range(phase * sent.rank, (phase + 1) * sent.rank))
                assert reference.relative_error(own.delta_weight(), part.delta_weight(name)) < 1e-8


def test_a_restart_with_the_moments_of_the_phase_before_would_be_another_result(monkeypatch):
    """Negative control of the comparison above: Adam's moments and its count begin anew."""
    slots, plain = SlotModel(tiny_model("llama")), tiny_model("llama")
    jobs, rows = cohort(slots, local=LocalPlan(restarts=1))
    monkeypatch.setattr(SlotOptimizer, "forget", lambda self, rows: None)
    (result,) = train(slots, jobs[:1], rows[:1], EPOCHS)
    phases = expected_phases(plain, jobs[0], rows[0], EPOCHS)
    assert reference.adapter_distance(result.adapter, reference.stacked(phases)) > 1e-3


def test_every_phase_starts_in_the_row_space_of_its_own_gradient():
    """``lora_A`` frozen, so that the update shows where each phase began; the gradient dense.

    Half of the way is at step 3 of 6; the gradient there is that of the model with the first
    phase's result in its weights.
    """
    model, plain = tiny_model("llama"), tiny_model("llama")
    slots = SlotModel(model)
    start = random_adapter(slots.shapes, 3, seed=1)
    start = Adapter({n: replace(f, lora_B=torch.zeros_like(f.lora_B)) for n, f in start.items()})
    plan = LocalPlan(restarts=1, gradient_batches=1)
    job = train_job(start, server_round=2, trainable=("lora_B",), local=plan)
    rows = random_examples(5, seed=5)
    (result,) = train(slots, [job], [rows], settings(learning_rate=0.1))
    batches = batch_plan(5, batch_size=2, steps=6, seed_parts=(3, "batches", 2, "c0"))
    first = Adapter({name: f.terms(range(3)) for name, f in result.adapter.items()})
    for phase, (at, before) in enumerate([(0, []), (3, [first])]):
        exact = dense_gradients(plain, before, [rows[i] for i in batches[at]])
        for name, factors in result.adapter.items():
            begun = factors.terms(range(3 * phase, 3 * phase + 3)).lora_A
            S = torch.linalg.svdvals(exact[name])
            best = float(S[:3].square().sum() / S.square().sum())
            assert energy_in(exact[name], begun) > 0.8 * best, (name, phase)
            sent = fresh_start(job, 1, 3)[name] if phase else start[name]
            assert energy_in(exact[name], sent.lora_A) < energy_in(exact[name], begun) - 0.1
    for factors in result.adapter.values():
        assert not torch.equal(factors.lora_A[:3], factors.lora_A[3:])


def dense_gradients(model, adapters, rows):
    """``dL/dW`` of every linear under ``adapters``, by autograd on the merged weights."""
    names = sorted(find_targets(model, "all-linear"))
    zero = random_adapter({n: model.get_submodule(n).weight.shape for n in names}, 1)
    merged = reference.merged_weights(model, [zero.map(torch.zeros_like), *adapters])
    merged = {name: weight.detach().requires_grad_() for name, weight in merged.items()}
    tokens = sum(len(row.input_ids) - row.prompt_length for row in rows)
    total = 0.0
    for row in rows:
        ids = torch.tensor([list(row.input_ids)])
        out = torch.func.functional_call(model, merged, (ids,), {"use_cache": False})
        total = total + reference.answer_loss(out.logits[0], row) / tokens
    gradients = torch.autograd.grad(total, list(merged.values()))
    return dict(zip(names, gradients, strict=True))


def energy_in(gradient, rows):
    """Share of the energy of ``gradient [out, in]`` in the span of ``rows``."""
    Q = torch.linalg.qr(rows.T).Q
    return float((gradient @ Q).square().sum() / gradient.square().sum())


@pytest.mark.parametrize("gradient_batches", [1, 3])
def test_aligned_restarts_of_a_cohort_equal_separate_runs(gradient_batches):
    """Also where a look ahead goes beyond another client's end."""
    slots = SlotModel(tiny_model("llama"))
    plan = LocalPlan(restarts=2, gradient_batches=gradient_batches)
    jobs, rows = cohort(slots, carried=True, local=plan)
    together = train(slots, jobs, rows, EPOCHS)
    plain = train(slots, *cohort(slots, carried=True, local=LocalPlan(restarts=2)), EPOCHS)
    for k, (job, examples) in enumerate(zip(jobs, rows, strict=True)):
        (alone,) = train(slots, [job], [examples], EPOCHS)
        assert reference.adapter_distance(together[k].adapter, alone.adapter) < 1e-9
        assert reference.adapter_distance(together[k].adapter, plain[k].adapter) > 1e-2


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
        drawn = sent.drawn_terms("c0", name)
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
        (client, at): tuple(drawing_job(slots.shapes, client, at).start.drawn_terms(client, name))
        for client in ("a", "b", "c")
        for at in range(1, 9)
    }
    assert len({drawn["a", at] for at in range(1, 9)}) > 1
    assert len({drawn[client, 1] for client in ("a", "b", "c")}) > 1
    assert {term for terms in drawn.values() for term in terms} == set(range(6))
    again = drawing_job(slots.shapes, "a", 1).start
    assert tuple(again.drawn_terms("a", name)) == drawn["a", 1]


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
