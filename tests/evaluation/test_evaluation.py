"""Held-out scores: answers are generated, never read off with the reference in view."""

import pytest
import torch

import reference
from answers import BOS, EOS, PAD, base_of, greedy, question, words
from answers import tokenizer as tokenizer
from builders import VOCAB, random_adapter, random_examples, tiny_model
from flexlora.data.collation import Example
from flexlora.evaluation.evaluate import BASE, evaluate
from flexlora.evaluation.generation import generate_answers
from flexlora.evaluation.likelihood import answer_token_losses
from flexlora.evaluation.text_scores import exact_match, rouge_l
from flexlora.training.local import answer_losses
from flexlora.training.slots import SlotModel
from flexlora.wire.jobs import EvalJob, Score


def counting_model():
    """A Llama that says t + 1 after t, and nothing else: its layers add zero."""
    model = tiny_model("llama", dtype=torch.float32, hidden=VOCAB)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(VOCAB))
        model.lm_head.weight.copy_(torch.eye(VOCAB).roll(1, dims=0))
    return model


def scores_of(model, tokenizer, rows, adapters=None, **options):
    slots = SlotModel(model)
    job = EvalJob(client_id="c", server_round=1, adapters=adapters or {}, generate=True)
    options = {"batch_size": 4, "max_new_tokens": 12, **options}
    (result,) = evaluate(slots, base_of(model, tokenizer), [job], [rows], **options)
    slots.remove()
    return result.scores


def test_answers_are_generated_from_the_prompt_alone_never_teacher_forced(tokenizer):
    """Trap T11. The model counts on from what it sees: shown the reference it looks right."""
    model = counting_model()
    row = question([BOS, 10], [30, 31, 32, 33, 34, 35])
    with torch.no_grad():
        forced = model(input_ids=torch.tensor([row.input_ids])).logits[0].argmax(dim=-1)
    seen = words(forced[row.prompt_length - 1 : -1].tolist())
    assert rouge_l(seen, row.answer) > 0.75, "the control is not one: argmax must look right"
    score = scores_of(model, tokenizer, [row])[BASE]
    assert (score.exact_match, score.rouge_l, score.generated) == (0.0, 0.0, 1)


def test_a_model_that_can_answer_scores_full_marks(tokenizer):
    """Prompts of unequal length in one batch: padding must not shift where an answer begins."""
    rows = [
        question([BOS, 3, 9, 50], range(51, VOCAB)),
        question([BOS, 57], range(58, VOCAB)),
        question([BOS, 8, 8, 8, 8, 8, 60], range(61, VOCAB)),
    ]
    rows = [Example(**{**row.__dict__, "input_ids": row.input_ids[:-1]}) for row in rows]
    wrong = question([BOS, 58], [59, 59])
    model = counting_model()
    with torch.no_grad():  # after the last word comes eos
        model.lm_head.weight.copy_(torch.eye(VOCAB).roll(1, dims=0))
        model.lm_head.weight[EOS] = torch.eye(VOCAB)[VOCAB - 1]
    score = scores_of(model, tokenizer, [*rows, wrong], max_new_tokens=16)[BASE]
    assert (score.exact_match, score.generated, score.rows) == (3.0, 4, 4)
    assert score.rouge_l == pytest.approx(3.0 + rouge_l(words(range(59, VOCAB)), "w59 w59"))


@pytest.mark.parametrize(
    "preferences",
    [
        {},
        {"do_sample": True, "temperature": 50.0, "top_k": 0},
        {"repetition_penalty": 5.0},
        {"num_beams": 3},
        {"min_new_tokens": 7, "no_repeat_ngram_size": 1},
    ],
    ids=str,
)
def test_generation_is_plain_greedy_whatever_the_model_prefers(tokenizer, preferences):
    """Chat models ship sampling, penalties and beams in generation_config.json."""
    model = tiny_model("llama", dtype=torch.float64)
    rows = [question(row.input_ids[: row.prompt_length], [5]) for row in random_examples(5)]
    for name, value in preferences.items():
        setattr(model.generation_config, name, value)
    slots = SlotModel(model)
    (answers,) = generate_answers(
        slots, [rows], tokenizer=tokenizer, max_new_tokens=8, batch_size=3, pad_token_id=PAD
    )
    expected = [greedy(model, row.input_ids[: row.prompt_length], 8) for row in rows]
    assert answers == expected
    assert len(set(expected)) > 1


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
def test_k_adapters_on_the_same_rows_equal_separate_evaluations(tokenizer, kind):
    model = tiny_model(kind)
    slots = SlotModel(model)
    rows = random_examples(7, seed=4)
    adapters = {f"rank_{rank}": random_adapter(slots.shapes, rank, seed=rank) for rank in (1, 3, 8)}
    slots.remove()
    together = scores_of(model, tokenizer, rows, adapters, batch_size=6)
    assert list(together) == list(adapters)
    for name, adapter in adapters.items():
        alone = scores_of(model, tokenizer, rows, {name: adapter}, batch_size=1)[name]
        assert together[name].loss == pytest.approx(alone.loss, rel=1e-9)
        for field in ("tokens", "rows", "exact_match", "rouge_l", "generated"):
            assert getattr(together[name], field) == getattr(alone, field), field


def test_loss_sums_are_those_of_the_merged_models_row_by_row():
    slots, plain = SlotModel(tiny_model("llama")), tiny_model("llama")
    rows = random_examples(5, seed=4)
    adapters = [random_adapter(slots.shapes, rank, seed=rank) for rank in (2, 4)]
    slots.load(adapters)
    losses = answer_token_losses(slots, [rows] * 2, batch_size=4, pad_token_id=PAD)
    for adapter, got in zip(adapters, losses, strict=True):
        for row, of_row in zip(rows, got, strict=True):
            with torch.no_grad():
                logits = reference.logits_of(plain, [adapter], row.input_ids)
            expected = float(reference.answer_loss(logits, row))
            assert float(of_row.sum()) == pytest.approx(expected, rel=1e-10)


def test_the_bare_base_is_scored_where_there_is_no_adapter(tokenizer):
    rows = random_examples(4)
    plain = tiny_model("llama")
    score = scores_of(tiny_model("llama"), tokenizer, rows)
    assert list(score) == [BASE]
    with torch.no_grad():
        expected = sum(
            float(reference.answer_loss(reference.logits_of(plain, [], row.input_ids), row))
            for row in rows
        )
    assert score[BASE].loss == pytest.approx(expected, rel=1e-9)
    assert score[BASE].tokens == sum(len(row.input_ids) - row.prompt_length for row in rows)


def test_jobs_that_share_adapters_share_passes_and_keep_their_own_rows(tokenizer, monkeypatch):
    import flexlora.evaluation.evaluate as module

    model = tiny_model("llama")
    slots = SlotModel(model)
    one = {"rank_2": random_adapter(slots.shapes, 2)}
    same = {"rank_2": random_adapter(slots.shapes, 2)}
    other = {"rank_3": random_adapter(slots.shapes, 3)}
    jobs = [
        EvalJob(client_id=name, server_round=1, adapters=adapters, generate=generate)
        for name, adapters, generate in [
            ("a", one, False),
            ("b", other, False),
            ("c", same, False),
            ("d", one, True),
            ("e", {}, False),
            ("f", one, False),
        ]
    ]
    rows = [random_examples(n, seed=n) for n in (3, 2, 5, 1, 2)] + [[]]
    loads = []
    plain_load = SlotModel.load
    monkeypatch.setattr(
        SlotModel, "load", lambda self, *a, **k: (loads.append(1), plain_load(self, *a, **k))[1]
    )
    base = base_of(model, tokenizer)
    options = {"batch_size": 4, "max_new_tokens": 3}
    together = module.evaluate(slots, base, jobs, rows, **options)
    assert len(loads) == 3, "a and c are one group, b one, d one (it generates), e has no adapter"
    assert [result.client_id for result in together] == list("abcdef")
    assert together[5].scores == {}
    for job, examples, result in zip(jobs[:5], rows, together, strict=False):
        (alone,) = module.evaluate(slots, base, [job], [examples], **options)
        assert list(result.scores) == list(alone.scores) == (list(job.adapters) or [BASE])
        for name, score in alone.scores.items():
            got = result.scores[name]
            assert got.loss == pytest.approx(score.loss, rel=1e-9)
            assert (got.rows, got.tokens) == (len(examples), score.tokens)
            assert (got.generated, got.rouge_l) == (score.generated, score.rouge_l)


@pytest.mark.parametrize("generate", [False, True])
def test_classes_that_are_served_the_same_adapter_are_scored_in_one_pass(
    tokenizer, generate, monkeypatch
):
    """Equal by content, not by object; the slot that is saved is counted in rows of the passes."""
    import flexlora.evaluation.evaluate as module

    model = tiny_model("llama")
    slots = SlotModel(model)
    one, other = (random_adapter(slots.shapes, 3, seed=seed) for seed in (1, 2))
    rows = random_examples(5, seed=4)
    base, seen = base_of(model, tokenizer), []

    def counted(slots, batch):
        seen.append(batch.input_ids.shape[0])
        return answer_losses(slots, batch)

    monkeypatch.setattr("flexlora.evaluation.likelihood.answer_losses", counted)

    def scores(**adapters):
        seen.clear()
        job = EvalJob(client_id="c", server_round=1, adapters=adapters, generate=generate)
        options = {"batch_size": 64, "max_new_tokens": 3}
        (result,) = module.evaluate(slots, base, [job], [rows], **options)
        return result.scores, list(seen)

    alone, passes = scores(a=one)
    assert passes == [5]
    same, passes = scores(a=one, b=one.map(torch.clone), c=one)
    assert passes == [5] and list(same) == ["a", "b", "c"]
    assert same["a"] == same["b"] == same["c"] == alone["a"]
    mixed, passes = scores(a=one, b=other, c=one.map(torch.clone))
    assert passes == [10] and list(mixed) == ["a", "b", "c"]
    assert mixed["a"] == mixed["c"] != mixed["b"]
    assert mixed["a"].loss == pytest.approx(alone["a"].loss, rel=1e-9)
    assert mixed["b"].loss == pytest.approx(scores(b=other)[0]["b"].loss, rel=1e-9)


def test_evaluation_leaves_no_slots_behind(tokenizer):
    model = tiny_model("llama")
    before = model(input_ids=torch.tensor([[1, 5, 9]])).logits
    slots = SlotModel(model)
    job = EvalJob(client_id="c", server_round=1, adapters={"x": random_adapter(slots.shapes)})
    base = base_of(model, tokenizer)
    evaluate(slots, base, [job], [random_examples(2)], batch_size=2, max_new_tokens=2)
    assert torch.equal(model(input_ids=torch.tensor([[1, 5, 9]])).logits, before)


@pytest.mark.parametrize(
    ("generated", "expected", "matches"),
    [
        ("red", "red", 1.0),
        (" red \n blue", "red blue", 1.0),
        ("Red", "red", 0.0),
        ("red.", "red", 0.0),
        ("red blue", "red", 0.0),
        ("", "red", 0.0),
        ("", "", 1.0),
    ],
)
def test_exact_match_is_equality_up_to_white_space(generated, expected, matches):
    assert exact_match(generated, expected) == matches


def lcs(a, b):
    """Length of the longest common subsequence, by the textbook recursion."""
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + lcs(a[1:], b[1:])
    return max(lcs(a[1:], b), lcs(a, b[1:]))


@pytest.mark.parametrize(
    ("generated", "expected"),
    [
        ("the cat sat on the mat", "the cat lay on a mat"),
        ("one two three", "three two one"),
        ("one", "one two three four"),
        ("something else", "one two"),
    ],
)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(generated, expected):
    a, b = generated.split(), expected.split()
    common = lcs(a, b)
    f1 = 2 * common / (len(a) + len(b))
    assert rouge_l(generated, expected) == pytest.approx(f1)


def test_rouge_l_of_nothing_is_zero():
    assert rouge_l("", "red") == 0.0


def test_scores_add_up():
    one = Score(loss=1.5, tokens=3, rows=1, exact_match=1.0, rouge_l=0.5, generated=1)
    two = Score(loss=0.5, tokens=2, rows=2)
    assert one + two == Score(loss=2.0, tokens=5, rows=3, exact_match=1.0, rouge_l=0.5, generated=1)
