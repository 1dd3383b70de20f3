"""The embedded world: families are disjoint and held out, the federation and the base are sound."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections import Counter, defaultdict

import pytest

from flexlora.data.collation import encode_rows
from flexlora.data.rows import Row
from flexlora.data.tasks import (
    DEFAULT,
    FAMILIES,
    choose_families,
    embedded_rows,
    generate_rows,
    split_of,
)
from flexlora.data.tasks.held_out import HELD_OUT, RIVER_CODE, past_of
from flexlora.data.tasks.known import KNOWN, plural_of
from flexlora.data.templates import render
from flexlora.errors import UserError
from flexlora.simulations.make_base.corpus import documents, plain_prompt
from paths import ROOT

BASE = ROOT / "flexlora" / "assets" / "base"
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    """A piece of the pretraining stream long enough to meet every skill many times."""
    return [prompt + answer for prompt, answer in itertools.islice(documents(seed=7), 20_000)]


def test_each_category_has_one_known_and_one_held_out_family():
    halves = defaultdict(list)
    for family in FAMILIES.values():
        halves[family.category].append(family.half)
    assert len(FAMILIES) >= 16
    assert len(halves) == 8
    assert all(sorted(found) == ["held-out", "known"] for found in halves.values())


def test_wordings_are_many_and_belong_to_one_family_each():
    wordings = Counter(text for family in FAMILIES.values() for text in family.paraphrases)
    assert set(wordings.values()) == {1}
    assert all(len(family.paraphrases) >= 4 for family in FAMILIES.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_splits_are_disjoint_whatever_the_seeds(name):
    inputs = {
        split: {row.input for seed in (0, 1, 2) for row in generate_rows(name, split, 60, seed)}
        for split in SPLITS
    }
    assert not inputs["train"] & inputs["validation"]
    assert not inputs["train"] & inputs["test"]
    assert not inputs["validation"] & inputs["test"]


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_short_exact_and_a_function_of_the_input(name):
    family = FAMILIES[name]
    answers: dict[str, str] = {}
    rng = random.Random(3)
    for _ in range(500):
        text, answer = family.generate(rng)
        assert 0 < len(answer) <= 16
        assert answer == answer.strip()
        assert "\n" not in text + answer
        assert answers.setdefault(text, answer) == answer


def test_rows_are_a_pure_function_of_the_seed_and_carry_their_labels():
    first, again = (generate_rows("plural", "train", 40, seed=5) for _ in range(2))
    assert first == again
    assert first != generate_rows("plural", "train", 40, seed=6)
    assert {(row.task, row.category) for row in first} == {("plural", "grammar")}
    assert len({row.instruction for row in first}) == len(FAMILIES["plural"].paraphrases)


def test_spelling_rules():
    assert [plural_of(noun) for noun in ("mato", "riby", "roy", "sebox", "tis")] == [
        "matos", "ribies", "roys", "seboxes", "tises",
    ]  # fmt: skip
    assert [past_of(verb) for verb in ("lomat", "riby", "akay", "sare")] == [
        "lomated", "ribied", "akayed", "sared",
    ]  # fmt: skip


def test_river_code_permutes_the_alphabet_and_moves_every_letter():
    assert sorted(RIVER_CODE) == sorted(RIVER_CODE.values())
    assert all(letter != partner for letter, partner in RIVER_CODE.items())


def test_unknown_family_unknown_split_and_too_many_rows_are_refused():
    with pytest.raises(UserError, match="Did you mean 'plural'"):
        generate_rows("plurals", "train", 1, 0)
    with pytest.raises(UserError, match="Split 'dev' is unknown"):
        generate_rows("plural", "dev", 1, 0)
    with pytest.raises(UserError, match="distinct validation inputs"):
        generate_rows("parity", "validation", 100_000, 0)
    with pytest.raises(UserError, match="at least 1 client"):
        embedded_rows(num_clients=0)


@pytest.mark.parametrize("tasks", ["default", "all", "plural,older,date"])
def test_federation_is_unequal_mixed_and_covers_every_family(tasks):
    rows = embedded_rows(num_clients=24, seed=0, tasks=tasks)
    assert rows == embedded_rows(num_clients=24, seed=0, tasks=tasks)
    assert rows != embedded_rows(num_clients=24, seed=1, tasks=tasks)
    assert set(rows) == set(SPLITS)
    amounts = Counter(row.client for row in rows["train"])
    assert sorted(amounts) == [f"client_{index:02d}" for index in range(24)]
    assert min(amounts.values()) >= 100
    assert max(amounts.values()) <= 400
    assert max(amounts.values()) > 2 * min(amounts.values())
    for split in SPLITS:
        held = defaultdict(set)
        for row in rows[split]:
            held[row.client].add(row.task)
            assert split_of(row.task, row.input) == split
        assert {len(tasks) for tasks in held.values()} == {1, 2, 3}
        assert set().union(*held.values()) == {family.name for family in choose_families(tasks)}


def test_the_default_families_are_half_known_and_half_held_out():
    halves = [FAMILIES[name].half for name in DEFAULT]
    assert halves.count("known") == halves.count("held-out") == 4
    assert choose_families("default") == [FAMILIES[name] for name in DEFAULT]
    assert choose_families("all") == list(FAMILIES.values())
    with pytest.raises(UserError, match=r"data.tasks has 'plurl'.*Did you mean 'plural'"):
        choose_families("date,plurl")


def test_corpus_holds_no_wording_of_a_held_out_family(corpus):
    text = "\n".join(corpus)
    leaks = [words for family in HELD_OUT for words in family.paraphrases if words[:-1] in text]
    assert leaks == []
    # The same search finds what pretraining may use, so it would have found a leak.
    allowed = [words for family in KNOWN for words in family.pretrained_paraphrases]
    assert [words for words in allowed if words[:-1] not in text] == []


def test_corpus_holds_no_answered_instance_of_a_held_out_family(corpus):
    solved = Counter()
    for document in corpus:
        lines = document.split("\n")
        if len(lines) != 3:
            continue
        for family in HELD_OUT:
            if lines[1] and _answers(family.name, lines[1]) == lines[2].removeprefix("Answer: "):
                solved[family.name] += 1
    assert solved == Counter()


def _answers(name: str, text: str) -> str | None:
    """The held-out rule applied to any text that its family could have drawn, else None."""
    if name == "river_code" and text.isalpha() and text.islower() and len(text) >= 3:
        return "".join(RIVER_CODE[letter] for letter in text)
    if name == "nines" and text.isdigit() and len(text) >= 3:
        return "".join(str(9 - int(digit)) for digit in text)
    if name == "rotate_list" and text.count(",") >= 2:
        first, rest = text.split(",", 1)
        return f"{rest},{first}"
    return None


def test_known_families_are_pretrained_on_train_instances_only(corpus):
    wordings = {words: family for family in KNOWN for words in family.paraphrases}
    seen = Counter()
    for document in corpus:
        lines = document.split("\n")
        family = wordings.get(lines[0])
        if family is not None:
            assert lines[0] in family.pretrained_paraphrases
            assert split_of(family.name, lines[1]) == "train"
            seen[family.name] += 1
    assert set(seen) == {family.name for family in KNOWN}


def test_corpus_prompt_is_the_base_tokenizers_template():
    tokenizer = _tokenizer()
    for name in FAMILIES:
        row = generate_rows(name, "train", 1, 0)[0]
        prompt, answer = render(row, template="auto", tokenizer=tokenizer)
        assert prompt == f"<s>{plain_prompt(row.instruction, row.input)}"
        assert answer == row.output


@pytest.mark.parametrize("system", [(), (("system", "Be brief."),)])
@pytest.mark.parametrize("asked", ["Red?", ""])
def test_the_base_is_trained_in_the_layout_it_was_pretrained_in(system, asked):
    """Pretraining tokenises prompt and answer apart, between bos and eos."""
    tokenizer, lines = _tokenizer(), [text for _, text in system]
    short = (*system, ("user", asked), ("assistant", "no"))
    long = (*system, ("user", "Red?"), ("assistant", "Yes."), ("user", asked), ("assistant", "no"))
    spoken = ["User: Red?", "Assistant: Yes.", f"User: {asked}"]
    for messages, turns in ((short, [asked] if asked else []), (long, spoken)):
        (example,), _ = encode_rows(
            [Row(output="no", messages=messages)],
            tokenizer=tokenizer,
            template="auto",
            max_length=256,
        )
        prompt = "\n".join([*lines, *turns, "Answer: "])
        ids = tokenizer([prompt, "no"], add_special_tokens=False)["input_ids"]
        assert list(example.input_ids) == [1, *ids[0], *ids[1], 2]
        assert tokenizer(prompt)["input_ids"] == [1, *ids[0]]


def _tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE)


def test_tokenizer_round_trips_and_spells_what_tasks_work_on():
    tokenizer = _tokenizer()
    specials = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert None not in specials
    assert len(set(specials)) == 4
    for text in ("Write the plural.\nmato\nAnswer: ", "naïve 漢字\t\n\n x", "19:45 pm"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
    for spelled in ("sebota", "4072", "ma,ri", "34+25"):
        assert len(tokenizer(spelled, add_special_tokens=False)["input_ids"]) == len(spelled)


def test_base_is_small_and_its_digest_is_the_recorded_one():
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(BASE)
    assert model.config.model_type == "llama"
    assert sum(parameter.numel() for parameter in model.parameters()) <= 4_000_000
    assert sum(path.stat().st_size for path in BASE.iterdir()) < 8_000_000
    digest = hashlib.sha256((BASE / "model.safetensors").read_bytes()).hexdigest()
    assert digest in (BASE / "README.md").read_text()
    assert json.loads((BASE / "config.json").read_text())["tie_word_embeddings"] is True
