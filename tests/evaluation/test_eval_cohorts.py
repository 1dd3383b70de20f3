"""Every client's own adapter on its own rows: a cohort scores what each client scores alone."""

from dataclasses import replace

import pytest
import torch

import flexlora.evaluation.likelihood as likelihood
import reference
from answers import BOS, PAD, base_of, greedy, question, words
from answers import tokenizer as tokenizer  # a fixture
from builders import VOCAB, random_adapter, random_examples, tiny_model
from flexlora.data.collation import Example
from flexlora.evaluation.cohorts import EvalPlan
from flexlora.evaluation.evaluate import BASE, PERSONAL, evaluate
from flexlora.evaluation.generation import generate_answers
from flexlora.evaluation.likelihood import answer_token_losses
from flexlora.training.slots import SlotModel
from flexlora.wire.jobs import EvalJob, Score

NEW_TOKENS = 4
COUNTS = {"a": 1, "b": 7, "c": 3, "d": 3, "e": 12, "f": 4}
RANKS = {"a": 3, "b": 1, "c": 8, "d": 2, "e": 5, "f": 2}


def answered(model, adapters, rows):
    """The rows with the answers that the merged ``model`` gives greedily: exact match is 1."""
    if adapters:
        model.load_state_dict(reference.merged_weights(model, adapters), strict=False)
    return [
        replace(row, answer=greedy(model, row.input_ids[: row.prompt_length], NEW_TOKENS))
        for row in rows
    ]


def population(kind="llama", dtype=torch.float64, generate=True):
    """Six clients of unequal ranks and rows over two classes, or over the base alone."""
    shapes = SlotModel(tiny_model(kind, dtype=dtype)).shapes
    served = {
        name: random_adapter(shapes, rank, seed=50 + rank, dtype=dtype)
        for name, rank in (("rank_2", 2), ("rank_4", 4))
    }
    jobs, rows = [], []
    for place, (client_id, count) in enumerate(COUNTS.items()):
        own = random_adapter(
            shapes,
            RANKS[client_id],
            alpha=3.0 + place,
            rslora=place % 2 == 1,
            seed=place,
            dtype=dtype,
        )
        over = ("", "rank_2", "rank_2", "rank_4", "rank_2", "")[place]
        job = EvalJob(
            client_id=client_id,
            server_round=1,
            adapters=served,
            generate=generate and client_id != "d",
            personal=own,
            personal_over=over,
        )
        jobs.append(job)
        below = [served[over]] if over else []
        examples = random_examples(count, seed=place, longest=12 + place)
        if job.generate:
            examples = answered(tiny_model(kind, dtype=dtype), [own, *below], examples)
        rows.append(examples)
    return jobs, rows


def scored(model, tokenizer, jobs, rows, *, batch_size=64):
    slots = SlotModel(model)
    results = evaluate(
        slots,
        base_of(model, tokenizer),
        jobs,
        rows,
        batch_size=batch_size,
        max_new_tokens=NEW_TOKENS,
    )
    slots.remove()
    return {result.client_id: result.scores for result in results}


def assert_same(one, other, rel):
    assert list(one) == list(other)
    for name, score in one.items():
        assert score.loss == pytest.approx(other[name].loss, rel=rel), name
        assert replace(score, loss=0.0) == replace(other[name], loss=0.0), name


@pytest.mark.parametrize(
    ("kind", "dtype", "rel"),
    [
        ("llama", torch.float64, 1e-9),
        ("gpt2", torch.float64, 1e-9),
        ("llama", torch.float32, 1e-5),
    ],
    ids=str,
)
def test_a_cohort_scores_what_each_client_scores_alone(tokenizer, kind, dtype, rel):
    """Texts are held against the dense oracle's: an exact match is a text that is equal."""
    jobs, rows = population(kind, dtype)
    together = scored(tiny_model(kind, dtype=dtype), tokenizer, jobs, rows)
    assert list(together) == list(COUNTS)
    for job, examples in zip(jobs, rows, strict=True):
        assert list(together[job.client_id]) == ["rank_2", "rank_4", PERSONAL]
        model = tiny_model(kind, dtype=dtype)
        alone = scored(model, tokenizer, [job], [examples], batch_size=1)[job.client_id]
        assert_same(together[job.client_id], alone, rel)
        own = together[job.client_id][PERSONAL]
        assert own.rows == COUNTS[job.client_id]
        if job.generate and dtype == torch.float64:
            assert own.exact_match == own.generated == own.rows
            assert together[job.client_id]["rank_4"].exact_match < own.rows


def test_the_loss_is_that_of_the_merged_model_row_by_row(tokenizer):
    jobs, rows = population(generate=False)
    together = scored(tiny_model(), tokenizer, jobs, rows)
    plain = tiny_model()
    for job, examples in zip(jobs, rows, strict=True):
        below = [job.adapters[job.personal_over]] if job.personal_over else []
        with torch.no_grad():
            expected = sum(
                float(reference.answer_loss(logits, row))
                for row in examples
                for logits in [reference.logits_of(plain, [job.personal, *below], row.input_ids)]
            )
        assert together[job.client_id][PERSONAL].loss == pytest.approx(expected, rel=1e-10)


def test_the_order_of_the_jobs_does_not_matter_bit_by_bit(tokenizer):
    jobs, rows = population(dtype=torch.float32)
    forward = scored(tiny_model(dtype=torch.float32), tokenizer, jobs, rows, batch_size=16)
    order = [4, 0, 5, 2, 1, 3]
    shuffled = [jobs[k] for k in order], [rows[k] for k in order]
    backward = scored(tiny_model(dtype=torch.float32), tokenizer, *shuffled, batch_size=16)
    assert forward == backward


@pytest.mark.parametrize("gone", COUNTS)
def test_who_is_absent_changes_nobody_elses_scores(tokenizer, gone):
    jobs, rows = population()
    everybody = scored(tiny_model(), tokenizer, jobs, rows)
    kept = [k for k, job in enumerate(jobs) if job.client_id != gone]
    rest = scored(tiny_model(), tokenizer, [jobs[k] for k in kept], [rows[k] for k in kept])
    for client_id, scores in rest.items():
        assert_same(scores, everybody[client_id], 1e-9)


def passes_of(monkeypatch):
    """``(rows in the batch, rows that are real)`` of every pass that follows."""
    seen, plain = [], likelihood.answer_losses

    def counted(slots, batch):
        seen.append((batch.input_ids.shape[0], sum(batch.rows_per_slot)))
        return plain(slots, batch)

    monkeypatch.setattr(likelihood, "answer_losses", counted)
    return seen


def test_clients_share_passes_of_at_most_batch_size_rows(tokenizer, monkeypatch):
    """Eight clients of four rows over one adapter: two passes of sixteen, not eight of four."""
    shapes = SlotModel(tiny_model()).shapes
    jobs = [
        EvalJob(
            client_id=f"client_{k}",
            server_round=1,
            adapters={},
            personal=random_adapter(shapes, 2, seed=k),
        )
        for k in range(8)
    ]
    rows = [random_examples(4, seed=k) for k in range(8)]
    base_rows = sum(len(own) for own in rows)
    seen = passes_of(monkeypatch)
    scores = scored(tiny_model(), tokenizer, jobs, rows, batch_size=16)
    assert list(scores["client_0"]) == [BASE, PERSONAL]
    assert seen == [(16, 16)] * (base_rows // 16) + [(16, 16)] * 2


def lengths_of(*counts_and_lengths):
    """Rows of one client each, ``(count, length)``."""
    row = {"prompt_length": 2, "prompt": "", "answer": ""}
    return [
        [Example(input_ids=(5,) * length, **row) for _ in range(count)]
        for count, length in counts_and_lengths
    ]


def cohorts(rows, batch_size, adapter, **changes):
    jobs = [
        EvalJob(
            client_id=f"client_{k}",
            server_round=1,
            adapters={"x": adapter},
            personal=adapter,
            **{name: values[k] for name, values in changes.items()},
        )
        for k in range(len(rows))
    ]
    return EvalPlan(jobs=jobs, examples=rows).cohorts(batch_size)


def test_cohorts_hold_clients_of_like_size_and_are_at_least_half_real(shapes):
    adapter = random_adapter(shapes)
    like = lengths_of((4, 10), (4, 90), (4, 12), (4, 80))
    assert cohorts(like, 64, adapter) == [[0, 2], [3, 1]]
    unlike = lengths_of((1, 10), (20, 10), (1, 10), (19, 10))
    assert cohorts(unlike, 64, adapter) == [[0, 2], [3, 1]]
    assert cohorts(lengths_of((9, 10), (9, 10), (30, 10)), 16, adapter) == [[0], [1], [2]]
    assert cohorts(lengths_of((2, 10), (0, 10), (2, 10)), 16, adapter) == [[0, 2]]


def test_cohorts_do_not_mix_what_lies_below_nor_who_generates(shapes):
    adapter, rows = random_adapter(shapes), lengths_of((2, 9), (2, 9), (2, 9), (2, 9))
    over = cohorts(rows, 64, adapter, personal_over=["", "x", "", "x"])
    assert over == [[0, 2], [1, 3]]
    generate = cohorts(rows, 64, adapter, generate=[False, True, False, True])
    assert generate == [[0, 2], [1, 3]]


def test_clients_without_rows_or_without_own_factors_have_no_such_score(tokenizer):
    jobs, rows = population(generate=False)
    jobs = [replace(jobs[0], personal=None), jobs[1], jobs[2]]
    scores = scored(tiny_model(), tokenizer, jobs, [rows[0], [], rows[2]])
    assert list(scores["a"]) == ["rank_2", "rank_4"]
    assert scores["b"] == {}
    assert PERSONAL in scores["c"] and scores["c"][PERSONAL] != Score()


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"personal_over": "rank_9"}, "client a: personal factors are over 'rank_9', expected one"),
        ({"adapters": PERSONAL}, "client a: personal factors and a rank class are both named"),
    ],
    ids=str,
)
def test_what_cannot_be_scored_is_told(tokenizer, changes, shown):
    jobs, rows = population(generate=False)
    if "adapters" in changes:
        changes = {"adapters": {PERSONAL: jobs[0].personal}}
    with pytest.raises(ValueError, match=shown):
        scored(tiny_model(), tokenizer, [replace(jobs[0], **changes)], [rows[0]])


def long_prompt(length, start):
    return question([BOS, *(3 + (start + i) % (VOCAB - 3) for i in range(length - 1))], [5])


class Plain:
    """Every id is a word: no bos, no eos, and padding is an ordinary one."""

    bos_token_id = eos_token_id = None

    def batch_decode(self, rows, skip_special_tokens):
        return [words(row.tolist()) for row in rows]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_answer_near_the_last_position_does_not_depend_on_its_neighbours(kind):
    """64 positions: prompts of 60, 62 and 64 tokens have room for 4, 2 and none; the short one for
    all. In one batch as wide as the longest prompt, the short one would be given nothing."""
    model = tiny_model(kind)
    model.generation_config.eos_token_id = None
    slots = SlotModel(model)
    rows = [[long_prompt(60, 1), long_prompt(5, 2)], [long_prompt(64, 3)], [long_prompt(62, 4)]]
    adapters = [random_adapter(slots.shapes, 2, seed=k) for k in range(3)]
    options = {"tokenizer": Plain(), "max_new_tokens": 8, "pad_token_id": PAD, "batch_size": 64}
    slots.load(adapters)
    together = generate_answers(slots, rows, **options)
    assert [[len(text.split()) for text in own] for own in together] == [[4, 8], [0], [2]]
    for adapter, own, texts in zip(adapters, rows, together, strict=True):
        slots.load([adapter])
        assert generate_answers(slots, [own], **options) == [texts]


def test_what_is_filled_in_after_a_rows_end_is_no_part_of_its_answer():
    """One row ends at once, its neighbour goes on: id 0 fills the gap and is a word here."""
    model = tiny_model()
    slots = SlotModel(model)
    rows = random_examples(6, seed=9)
    options = {"tokenizer": Plain(), "max_new_tokens": 8, "pad_token_id": PAD}
    first = greedy(model, rows[0].input_ids[: rows[0].prompt_length], 1)
    model.generation_config.eos_token_id = int(first.removeprefix("w"))
    together = generate_answers(slots, [rows], batch_size=6, **options)
    alone = [generate_answers(slots, [[row]], batch_size=1, **options)[0][0] for row in rows]
    assert together == [alone] and alone[0] == "" and len(max(alone, key=len).split()) == 8


def test_slots_with_fewer_rows_than_others_end_earlier():
    slots = SlotModel(tiny_model())
    rows = [random_examples(n, seed=n) for n in (1, 9, 4)]
    adapters = [random_adapter(slots.shapes, 2, seed=k) for k in range(3)]
    slots.load(adapters)
    small = answer_token_losses(slots, rows, batch_size=3, pad_token_id=PAD)
    large = answer_token_losses(slots, rows, batch_size=64, pad_token_id=PAD)
    assert [len(own) for own in small] == [1, 9, 4]
    for a, b in zip(small, large, strict=True):
        assert [float(x.sum()) for x in a] == pytest.approx([float(x.sum()) for x in b], rel=1e-10)
