"""Continuous batching answers as PEFT alone does, whatever else is in the batch."""

import random
import warnings
from itertools import combinations

import pytest
import torch

from flexlora.evaluation.generation import end_ids
from flexlora.lora.peft_folder import save_adapter
from flexlora.training.models import load_base
from flexlora.training.targets import find_targets
from served import answer, asked, drained, engine_of, generated, prompts, strong_adapter

RANKS = {"two": 2, "three": 3, "eight": 8, "sixteen": 16, "forty": 40, "sixty-four": 64}
NAMES = [None, *RANKS]
LONGEST = 12


@pytest.fixture(scope="module")
def base():
    return load_base("embedded", device="cpu", fresh=True)


@pytest.fixture(scope="module")
def adapters(base):
    shapes = find_targets(base.model, "all-linear")
    return {name: strong_adapter(shapes, rank, i) for i, (name, rank) in enumerate(RANKS.items())}


@pytest.fixture(scope="module")
def questions():
    return prompts(10, seed=3)


@pytest.fixture(scope="module")
def expected(base, adapters, questions, tmp_path_factory):
    """PEFT's greedy tokens by (adapter, question): each adapter loaded alone, each prompt alone."""
    from peft import PeftModel

    found, ends = {}, end_ids(base.model, base.tokenizer)
    for name in NAMES:
        model = load_base("embedded", device="cpu", fresh=True).model
        if name is not None:
            folder = tmp_path_factory.mktemp("adapter")
            save_adapter(adapters[name], folder, base="x")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = PeftModel.from_pretrained(model, folder).eval()
        for q, prompt in enumerate(questions):
            found[name, q] = generated(model, prompt, LONGEST, ends)
    return found


@pytest.fixture
def engine(base, adapters):
    """Two thirds of the adapters fit on the device, the cache has room for nine requests."""
    one_row = sum(out + width for out, width in find_targets(base.model, "all-linear").values())
    limits = {"max_running": 12, "prefill_tokens": 24, "cache_bytes": 9 * 64 * 4096}
    with engine_of(base, adapters, device_bytes=4 * one_row * 90, **limits) as engine:
        yield engine


@pytest.mark.parametrize("seed", range(3))
def test_every_answer_is_pefts_under_random_arrivals_cancellations_and_swaps(
    engine, adapters, questions, expected, seed
):
    """Adapters are evicted and loaded again, replaced by themselves, and requests hang up."""
    draw = random.Random(seed)
    readers, left = {}, 60
    while left or engine.step():
        for _ in range(draw.choice((0, 0, 1, 3, 8))):
            if left:
                left -= 1
                name, q = draw.choice(NAMES), draw.randrange(len(questions))
                count = draw.randint(1, LONGEST)
                readers[name, q, count, left] = asked(
                    engine, str(left), questions[q], name, max_tokens=count
                )
        if readers and draw.random() < 0.15:
            engine.cancel(str(draw.choice(list(readers))[3]))
        if draw.random() < 0.1:
            name = draw.choice(list(RANKS))
            engine.adapters.add(name, adapters[name], replace=True)
        engine.step()
    cancelled = 0
    for (name, q, count, _), reader in readers.items():
        whole = expected[name, q][:count]
        if reader.reason == "cancelled":
            cancelled += 1
            whole = whole[: len(reader.tokens)]
        assert reader.tokens == whole, f"adapter {name}, question {q}"
    stats = engine.stats()
    assert (stats.failed, stats.cancelled, stats.finished) == (0, cancelled, 60 - cancelled)
    assert cancelled > 0
    assert stats.adapter_evictions > 0
    assert (stats.running, stats.waiting, stats.cache_bytes_used) == (0, 0, 0)
    assert stats.cache_bytes == 0


def test_the_adapters_answers_differ_so_that_a_wrong_one_is_seen(expected, questions):
    """The control of the test above: any two adapters differ on nearly all questions."""
    for one, other in combinations(NAMES, 2):
        same = sum(expected[one, q] == expected[other, q] for q in range(len(questions)))
        assert same <= 2, (one, other)


def test_many_requests_of_all_adapters_share_each_pass(base, adapters, questions, expected):
    pairs = [(name, q) for name in NAMES for q in range(len(questions))][:64]
    with engine_of(base, adapters) as engine:
        readers = {
            (name, q): asked(engine, f"{name} {q}", questions[q], name, max_tokens=LONGEST)
            for name, q in pairs
        }
        drained(engine)
        assert engine.stats().steps <= LONGEST + 4, "the prompts take up to four steps"
    for pair, reader in readers.items():
        assert reader.tokens == expected[pair]


def test_a_replaced_adapter_is_the_one_that_new_requests_get(base, adapters, questions, expected):
    """--follow: a round closes while an answer is under way."""
    with engine_of(base, {"run": adapters["two"]}) as engine:
        before = asked(engine, "before", questions[0], "run", max_tokens=LONGEST)
        engine.step()
        engine.step()
        engine.adapters.add("run", adapters["forty"], replace=True)
        after = asked(engine, "after", questions[0], "run", max_tokens=LONGEST)
        engine.step()
        engine.adapters.remove("run")
        drained(engine)
        assert before.tokens == expected["two", 0]
        assert after.tokens == expected["forty", 0]
        assert engine.stats().adapters_on_device == 0, "no name and no request refers to either"


@pytest.mark.parametrize("budget", [1, 5, 1000])
def test_a_prompt_in_parts_is_the_prompt_at_once(base, adapters, questions, expected, budget):
    longest = max(range(len(questions)), key=lambda q: len(questions[q]))
    with engine_of(base, adapters, prefill_tokens=budget) as engine:
        other = asked(engine, "other", questions[0], "two", max_tokens=LONGEST)
        reader = asked(engine, "long", questions[longest], "eight", max_tokens=LONGEST)
        drained(engine)
    assert reader.tokens == expected["eight", longest]
    assert other.tokens == expected["two", 0]


def test_the_model_is_as_before_after_close(base, adapters, questions):
    ids = torch.tensor([questions[0]])
    with torch.no_grad():
        before = base.model(input_ids=ids).logits
        with engine_of(base, adapters) as engine:
            answer(engine, questions[0], "two", max_tokens=2)
        assert torch.equal(base.model(input_ids=ids).logits, before)


def test_an_answer_ends_where_the_models_positions_do(base, questions):
    """The embedded base has 256, for prompt and answer together."""
    with engine_of(base, {}) as engine:
        reader = answer(engine, [20] * 250, max_tokens=50)
    ended = len(reader.tokens) == 6 or reader.tokens[-1] in end_ids(base.model, base.tokenizer)
    assert ended
    assert reader.reason == ("length" if len(reader.tokens) == 6 else "stop")


def test_sampled_tokens_depend_on_the_seed_and_not_on_the_batch(base, adapters, questions):
    """The same request alone, and between others that come and go."""
    options = {"max_tokens": 20, "temperature": 5.0, "top_p": 0.95}
    with engine_of(base, adapters) as engine:
        alone = answer(engine, questions[1], "eight", seed=7, **options).tokens
        other = answer(engine, questions[1], "eight", seed=8, **options).tokens
        for i, name in enumerate(("two", "forty", "eight", "sixty-four")):
            asked(engine, f"noise {i}", questions[i], name, temperature=1.5, max_tokens=3 + 7 * i)
        engine.step()
        first = asked(engine, "x", questions[1], "eight", seed=7, **options)
        engine.step()
        second = asked(engine, "y", questions[1], "eight", seed=7, **options)
        drained(engine)
    assert first.tokens == second.tokens == alone
    assert other != alone, "the control: another seed"
