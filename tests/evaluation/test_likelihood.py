"""Choices by likelihood and bits per byte, against a merged float64 model row by row."""

import math

import pytest
import torch

import evaluation_reference
import reference
from answers import EOS, base_of, words
from answers import tokenizer as tokenizer
from builders import VOCAB, random_adapter, tiny_model
from flexlora.data.collation import Example
from flexlora.evaluation.evaluate import BASE, evaluate
from flexlora.evaluation.likelihood import likelihood_score
from flexlora.evaluation.metrics import METRICS, means
from flexlora.evaluation.text_scores import passes_pattern
from flexlora.training.slots import SlotModel
from flexlora.wire.jobs import EvalJob, Score


def choice_row(prompt, answers, right):
    variants = [
        Example(
            input_ids=(*prompt, *answer, EOS),
            prompt_length=len(prompt),
            prompt=words(prompt),
            answer=words(answer),
            ends=(EOS,),
        )
        for answer in answers
    ]
    return Example(**{**variants[right].__dict__, "choices": tuple(variants)})


def random_choice_rows(count, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(3, VOCAB, (length,), generator=generator).tolist()

    return [
        choice_row(draw(2, 7), [draw(1, 2), draw(2, 4), draw(3, 6)], right=k % 3)
        for k in range(count)
    ]


def scores_of(model, tokenizer, rows, adapters):
    slots = SlotModel(model)
    job = EvalJob(client_id="c", server_round=1, adapters=adapters)
    (result,) = evaluate(
        slots, base_of(model, tokenizer), [job], [rows], batch_size=8, max_new_tokens=1
    )
    slots.remove()
    return result.scores


def test_acc_and_acc_norm_are_those_of_merged_models_for_every_adapter(tokenizer):
    rows, plain = random_choice_rows(12), tiny_model("llama")
    shapes = SlotModel(tiny_model("llama")).shapes
    adapters = {f"rank_{r}": random_adapter(shapes, r, seed=r) for r in (1, 6)}
    found = scores_of(tiny_model("llama"), tokenizer, rows, adapters)
    counted = set()
    for name, adapter in adapters.items():
        correct = correct_norm = loss = 0.0
        for row in rows:
            prompt = row.input_ids[: row.prompt_length]
            answers = [c.input_ids[c.prompt_length : -1] for c in row.choices]
            with torch.no_grad():
                sums = [
                    evaluation_reference.log_likelihood(plain, [adapter], prompt, answer)
                    for answer in answers
                ]
                logits = reference.logits_of(plain, [adapter], row.input_ids)
                loss += float(reference.answer_loss(logits, row))
            lengths = [len(words(answer)) for answer in answers]
            norms = [s / n for s, n in zip(sums, lengths, strict=True)]
            correct += evaluation_reference.best(sums) == row.right_choice
            correct_norm += evaluation_reference.best(norms) == row.right_choice
        score = found[name]
        assert (score.correct, score.correct_norm, score.choice_rows) == (correct, correct_norm, 12)
        assert score.loss == pytest.approx(loss, rel=1e-9), "of the right choice, with its end"
        counted |= {correct, correct_norm}
    assert len(counted) > 1, "the control: the sum favours short choices, the mean does not"


def test_the_end_of_an_answer_is_no_part_of_a_choice(tokenizer):
    """A model that is sure of what follows, and never of an end, has the same choice."""
    row = choice_row([5], [[6], [7]], right=0)
    losses = [torch.tensor([1.0, 50.0]), torch.tensor([2.0, 0.0])]
    assert likelihood_score(row, losses).correct == 1.0
    assert likelihood_score(row, losses).loss == 51.0
    open_ended = Example(
        **{
            **row.__dict__,
            "choices": tuple(Example(**{**choice.__dict__, "ends": ()}) for choice in row.choices),
        }
    )
    assert likelihood_score(open_ended, losses).correct == 0.0, "the control"


def test_bits_per_byte_do_not_depend_on_how_the_text_is_cut_into_tokens():
    """One distribution over texts, two tokenizers: the loss per token differs, the bits do not."""
    answer = "naïve"  # six bytes
    one = Example(input_ids=(1, 2, 3), prompt_length=1, prompt="", answer=answer)
    many = Example(input_ids=(1, 2, 3, 4, 5, 6), prompt_length=1, prompt="", answer=answer)
    coarse = likelihood_score(one, [torch.tensor([4.0, 2.0]).double()])
    fine = likelihood_score(many, [torch.tensor([1.0, 2.0, 1.0, 1.0, 1.0]).double()])
    assert means(coarse)["bits_per_byte"] == pytest.approx(6.0 / math.log(2) / 6)
    assert means(fine)["bits_per_byte"] == pytest.approx(means(coarse)["bits_per_byte"])
    assert means(fine)["loss"] != means(coarse)["loss"], "the control"


def test_a_pattern_is_searched_in_the_generated_answer_alone(tokenizer):
    model = tiny_model("llama")
    row = {"input_ids": (1, 9, 20, EOS), "prompt_length": 2, "prompt": "", "answer": "w20"}
    rows = [
        Example(**row, pattern=r"^w\d+ w\d+"),
        Example(**row, pattern="nothing like it"),
        Example(**row),
    ]
    slots = SlotModel(model)
    job = EvalJob(client_id="c", server_round=0, adapters={}, generate=True)
    (result,) = evaluate(
        slots, base_of(model, tokenizer), [job], [rows], batch_size=4, max_new_tokens=4
    )
    score = result.scores[BASE]
    assert (score.pattern_rows, score.passed, score.generated) == (2, 1.0, 3)
    assert passes_pattern("the answer is 42.", r"\b42\b") == 1.0
    assert passes_pattern("the answer is 142.", r"\b42\b") == 0.0


def test_a_metric_that_no_row_has_is_left_out():
    assert means(Score()) == {}
    assert list(means(Score(loss=1.0, tokens=2, rows=1, answer_bytes=4))) == [
        "loss",
        "bits_per_byte",
    ]
    assert len({metric.key for metric in METRICS}) == len(METRICS)
