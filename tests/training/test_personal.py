"""Factors that stay with their client: how they are trained, and that nobody else feels them."""

from dataclasses import replace

import pytest
import torch

import reference
from builders import random_adapter, random_examples, tiny_model, train_job
from cohorts import EPOCHS, cohort, recipe
from federation import small
from flexlora.aggregation import METHODS, make_method
from flexlora.aggregation.engine.open_round import OpenRound
from flexlora.aggregation.engine.starts import Factoring
from flexlora.aggregation.engine.state import GlobalChange, State
from flexlora.aggregation.engine.updates import Update
from flexlora.clients.messages import encode_train_result
from flexlora.clients.worker import Worker
from flexlora.lora.adapters import Adapter
from flexlora.lora.ranks import RankClass
from flexlora.training.local import train
from flexlora.training.personal import PersonalPlan, PersonalStore, frozen_model, personalised
from flexlora.training.slots import SlotModel
from flexlora.wire.jobs import PERSONAL, TrainJob
from one_round import OneRound, next_state
from packed import packed_bytes
from spelled import of_names

PLAN = PersonalPlan(rank=4, max_steps=3, learning_rate=0.02, alpha=8.0, seed=11)
OWN = {"personal__rank": 2, "personal__max_steps": 2}


# --- what is trained -------------------------------------------------------------------------


def test_own_factors_are_trained_over_the_frozen_model_that_was_sent(llama):
    """The oracle: a plain torch loop on weights into which trained and carried are merged."""
    slots, plain = SlotModel(llama), tiny_model("llama")
    jobs, rows = cohort(slots, carried=True)
    own = [PLAN.job(job) for job in jobs]
    chosen = PLAN.settings(EPOCHS)
    assert chosen.seed == 11 and chosen.max_steps == 3
    results = train(slots, own, rows, chosen)
    for job, personal, examples, result in zip(jobs, own, rows, results, strict=True):
        expected = reference.train_one_client(
            plain,
            personal.start.trained,
            examples,
            recipe(personal, examples, chosen),
            carried=job.start.served(),
        )
        assert reference.adapter_distance(result.adapter, expected) < 1e-9


def test_k_clients_at_once_equal_each_alone(llama):
    slots = SlotModel(llama)
    jobs, rows = cohort(slots, carried=True)
    own, chosen = [PLAN.job(job) for job in jobs], PLAN.settings(EPOCHS)
    together = train(slots, own, rows, chosen)
    for job, examples, result in zip(own, rows, together, strict=True):
        (alone,) = train(slots, [job], [examples], chosen)
        assert reference.adapter_distance(result.adapter, alone.adapter) < 1e-9
        assert result.loss_after < result.loss_before


def test_a_client_begins_at_zero_with_rows_of_its_own(llama):
    """Live lora_A, zero lora_B; another client, another seed: other rows, and the same again."""
    sent = random_adapter(SlotModel(llama).shapes, 3)
    first, other = (PLAN.job(train_job(sent, name)).start.trained for name in ("a", "b"))
    again = PLAN.job(train_job(sent, "a", server_round=3)).start.trained
    reseeded = PLAN.model_copy(update={"seed": 12}).job(train_job(sent, "a")).start.trained
    for name, factors in first.items():
        assert factors.rank == 4 and factors.alpha == 8.0
        assert not factors.lora_B.any() and factors.lora_A.abs().min() > 0
        assert torch.equal(factors.lora_A, again[name].lora_A)
        for another in (other, reseeded):
            assert not torch.equal(factors.lora_A, another[name].lora_A)


def test_the_rank_is_capped_module_by_module(llama):
    shapes = SlotModel(llama).shapes
    own = (
        PLAN.model_copy(update={"rank": 1000})
        .job(train_job(random_adapter(shapes, 2)))
        .start.trained
    )
    assert {name: factors.rank for name, factors in own.items()} == {
        name: min(shape) for name, shape in shapes.items()
    }
    assert len({factors.rank for factors in own.values()}) > 1


def test_a_client_goes_on_from_what_it_kept(llama):
    """With a rate of zero nothing moves: what comes back is what was kept, bit by bit."""
    slots = SlotModel(llama)
    sent, rows = random_adapter(slots.shapes, 3), random_examples(5)
    kept = random_adapter(slots.shapes, 4, alpha=8.0, seed=5)
    job = replace(train_job(sent), personal=kept)
    still = PLAN.model_copy(update={"learning_rate": 0.0})
    (result,) = train(slots, [still.job(job)], [rows], still.settings(EPOCHS))
    for name, factors in kept.items():
        assert torch.equal(result.adapter[name].lora_A, factors.lora_A)
        assert torch.equal(result.adapter[name].lora_B, factors.lora_B)


# --- what it is trained over, method by method -----------------------------------------------


def sent_by(method, state):
    """What each class is sent."""
    return list(OneRound(method, state).sent.values())


@pytest.mark.parametrize("name", METHODS)
def test_with_every_method_the_frozen_model_is_what_the_client_was_sent(name):
    """Trained and carried together, whatever part of it the client would train itself."""
    state = next_state(name, next_state(name))
    for start in sent_by(name, state):
        frozen, _ = frozen_model(start)
        whole = [start.trained] + ([start.carried] if start.carried is not None else [])
        for module in start.trained:
            expected = sum(adapter.delta_weight(module) for adapter in whole)
            assert reference.relative_error(frozen.delta_weight(module), expected) < 1e-12
        job = PLAN.job(TrainJob(client_id="c", server_round=3, num_server_rounds=5, start=start))
        assert job.start.local.merge == start.local.merge
        assert (job.start.trainable, job.start.local.select) == (("lora_A", "lora_B"), False)


@pytest.mark.parametrize("name", METHODS)
def test_before_anything_is_learned_nothing_is_carried(name):
    for start in sent_by(name, None):
        assert frozen_model(start) == (None, "")


def test_carried_factors_in_16_bits_stay_so_only_where_all_of_them_came_so(llama):
    shapes = SlotModel(llama).shapes
    carried = random_adapter(shapes, 6, seed=2)
    fresh = random_adapter(shapes, 3).map(torch.clone)
    zero = Adapter({n: replace(f, lora_B=torch.zeros_like(f.lora_B)) for n, f in fresh.items()})
    halved = {"carried": carried, "carried_dtype": "bfloat16"}
    assert frozen_model(train_job(zero, **halved).start) == (carried, "bfloat16")
    assert frozen_model(train_job(fresh, **halved).start)[1] == ""


def test_over_a_merged_base_the_same_is_learned_as_beside_it(llama):
    """FLoRA's and FLoRIST's clients merge what they are sent into their weights."""
    slots = SlotModel(llama)
    state = State(round=1, change=change_of(slots.shapes))
    start = make_method("flora").start(state, RankClass.of(3), Factoring(alpha=8.0))
    assert start.local.merge
    job = TrainJob(client_id="c", server_round=2, num_server_rounds=3, start=start)
    beside = replace(job, start=replace(start, local=replace(start.local, merge=False)))
    rows, chosen = random_examples(5), PLAN.settings(EPOCHS)
    merged, plain = (train(slots, [PLAN.job(j)], [rows], chosen)[0] for j in (job, beside))
    nothing = replace(start, carried=None)
    (bare,) = train(slots, [PLAN.job(replace(job, start=nothing))], [rows], chosen)
    assert reference.adapter_distance(merged.adapter, plain.adapter) < 1e-9
    assert reference.adapter_distance(merged.adapter, bare.adapter) > 1e-3


def change_of(shapes):
    adapter = random_adapter(shapes, 5, seed=8)
    method = make_method("flexlora")
    state = State(round=0, change=GlobalChange.zero(shapes, torch.float64))
    opened = OpenRound(method, state, {})
    opened.add(Update(client_id="a", adapter=adapter, num_examples=1))
    return opened.close().change


# --- nobody else feels it --------------------------------------------------------------------


def test_clients_that_were_sent_the_same_share_one_frozen_model(llama):
    slots = SlotModel(llama)
    trained, carried = random_adapter(slots.shapes, 2), random_adapter(slots.shapes, 6, seed=1)
    jobs = [train_job(trained, name, carried=carried) for name in "abc"]
    jobs.append(train_job(random_adapter(slots.shapes, 3), "d"))
    seen = []

    def spy(own, settings):
        seen.extend(own)
        return train(slots, own, rows, settings)

    rows = [random_examples(4, seed=k) for k in range(4)]
    results = train(slots, jobs, rows, EPOCHS)
    done = personalised(PLAN, jobs, results, EPOCHS, spy)
    assert seen[0].start.carried is seen[1].start.carried is seen[2].start.carried
    assert seen[3].start.carried is not seen[0].start.carried
    assert all(result.personal is not None and not result.note for result in done)
    assert [r.adapter for r in done] == [r.adapter for r in results]


def test_kept_factors_of_another_rank_are_told_and_cost_nobody_else(llama):
    slots = SlotModel(llama)
    sent = random_adapter(slots.shapes, 2)
    odd = random_adapter(slots.shapes, 8, alpha=8.0)
    jobs = [replace(train_job(sent, "a"), personal=odd), train_job(sent, "b")]
    rows = [random_examples(4), random_examples(4)]
    results = train(slots, jobs, rows, EPOCHS)

    def own(jobs, settings):
        return train(slots, jobs, rows[: len(jobs)], settings)

    first, second = personalised(PLAN, jobs, results, EPOCHS, own)
    assert first.adapter is results[0].adapter and first.personal is None
    assert "client a, module" in first.note and "of rank 8" in first.note
    assert "expected of rank 4" in first.note
    assert second.personal is not None and second.note == ""


@pytest.fixture(scope="module")
def workers():
    """The same clients with and without factors of their own; dropout, so that draws are drawn."""
    config = small(lora__dropout=0.2, eval__max_examples=4, eval__generate="never")
    return Worker(config), Worker(config.with_values(of_names(**OWN)))


def first_round(worker, method="flexlora"):
    """A job for every client, at ranks 2 and 4 in turn, from a round-one state."""
    state = State(round=0, change=GlobalChange.zero(worker.shapes))
    starts = [
        make_method(method).start(state, RankClass.of(rank), Factoring(alpha=16.0)).sealed()
        for rank in (2, 4)
    ]
    return [
        TrainJob(client_id=name, server_round=1, num_server_rounds=3, start=starts[k % 2])
        for k, name in enumerate(worker.client_ids)
    ]


def reply_bytes(results):
    """Everything that goes to the server, without what a clock has measured."""
    replies = []
    for result in results:
        content = encode_train_result(replace(result, train_seconds=0.0), dtype="float32")
        values = [(k, dict(record)) for k, record in content.config_records.items()]
        replies.append((packed_bytes(content), values))
    return repr(replies)


def test_what_is_sent_is_the_same_bytes_with_and_without_own_factors(workers):
    """Over two rounds, the second of which goes on from kept factors."""
    plain, personal = workers
    store = PersonalStore()
    jobs = first_round(plain)
    for server_round in (1, 2):
        jobs = [replace(job, server_round=server_round) for job in jobs]
        without = plain.train(jobs)
        attached = store.attach(jobs)
        results = personal.train(attached)
        store.keep(results, attached)
        assert all(job.personal is not None for job in attached) == (server_round == 2)
        assert all(f.lora_B.any() for r in results for f in r.personal.values())
        assert all(result.personal is None for result in without)
        assert reply_bytes(results) == reply_bytes(without)
        assert PERSONAL not in reply_bytes(results)


@pytest.mark.parametrize(
    ("fails", "shown"),
    [
        (lambda rows: True, "personal factors: out of memory at rank 2 with 1 row in a pass"),
        (lambda rows: rows > 1, "personal factors: out of memory with 2 rows in a pass: trained"),
    ],
    ids=["never", "smaller"],
)
def test_without_memory_for_own_factors_the_update_is_sent_all_the_same(fails, shown, monkeypatch):
    import flexlora.clients.worker as module

    honest = module.train

    def short(slots, jobs, examples, settings, **options):
        own = [job for job in jobs if job.start.rank_class.name == PERSONAL]
        if any(job.client_id == "client_02" for job in own) and fails(settings.rows_per_pass):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return honest(slots, jobs, examples, settings, **options)

    config = small()
    plain, worker = Worker(config), Worker(config.with_values(of_names(**OWN)))
    expected = plain.train(first_round(plain))
    monkeypatch.setattr(module, "train", short)
    results = {result.client_id: result for result in worker.train(first_round(worker))}
    assert results["client_02"].note.startswith(shown)
    assert (results["client_02"].personal is None) == shown.endswith("pass")
    assert "asks for" not in results["client_02"].note and results["client_02"].asked_rank == 0
    assert all(r.personal is not None for k, r in results.items() if k != "client_02")
    cleared = [replace(result, note="") for result in results.values()]
    assert reply_bytes(cleared) == reply_bytes(expected)
