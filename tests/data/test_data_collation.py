"""Templates, encoding and batches: what the model reads, what it learns, and where padding goes."""

import random
from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from flexlora.data.collation import (
    IGNORE_INDEX,
    Example,
    batch_plan,
    collate,
    collate_prompts,
    encode_rows,
)
from flexlora.data.rows import Row, parse_row
from flexlora.data.templates import render
from flexlora.errors import UserError
from small_tokenizers import TEXT, byte_bpe

WORDS = TEXT.split()
CHAT_TEMPLATE = (
    "{{ bos_token or '' }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def encode_row(row, **options):
    """One row alone: its example, or None where it was dropped."""
    examples, dropped = encode_rows([row], **options)
    assert len(examples) + dropped == 1
    return examples[0] if examples else None


def llama_like():
    """As Llama's: a word mark before every text, and bytes for unknown characters."""
    letters = sorted(set("".join(WORDS[:10])) | {"▁"})
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *letters]
    core = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(vocab)}, [], unk_token="<unk>", byte_fallback=True
        )
    )
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="module")
def tokenizers():
    chat = byte_bpe(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    chat.chat_template = CHAT_TEMPLATE
    bare_chat = byte_bpe()
    bare_chat.chat_template = CHAT_TEMPLATE.replace("bos_token or ''", "''")
    quiet_chat = byte_bpe(bos_token="<bos>", eos_token="<eos>")
    quiet_chat.chat_template = bare_chat.chat_template
    return {
        "full": byte_bpe(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"),
        "bare": byte_bpe(),
        "one_for_all": byte_bpe(bos_token="<|end|>", eos_token="<|end|>"),
        "llama": llama_like(),
        "chat": chat,
        "bare_chat": bare_chat,
        "quiet_chat": quiet_chat,
    }


NAMES = ("full", "bare", "one_for_all", "llama", "chat", "bare_chat", "quiet_chat")


@pytest.fixture(params=NAMES)
def tokenizer(request, tokenizers):
    return tokenizers[request.param]


def make_rows(count=40, seed=0):
    draw = random.Random(seed)

    def text(low, high):
        return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))

    rows = [
        Row(instruction=text(0, 6), input=text(0, 60), output=text(1, 8), task=f"task_{i % 3}")
        for i in range(count)
    ]
    turns = (("user", text(3, 9)), ("assistant", text(1, 3)), ("user", text(2, 4)))
    return [*rows, Row(output="blue", messages=(*turns, ("assistant", "blue")))]


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def learned_ids(tokenizer, row, template="auto"):
    """The ids of the answer behind its prompt, from the ids of both; alone if they merge."""
    prompt, learned = render(row, template=template, tokenizer=tokenizer)
    head, whole = ids(tokenizer, prompt), ids(tokenizer, prompt + learned)
    after = whole[len(head) :] if whole[: len(head)] == head else ids(tokenizer, learned)
    return after + ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])


def encode(rows, tokenizer, max_length=10_000, template="auto"):
    return encode_rows(rows, tokenizer=tokenizer, template=template, max_length=max_length)


FULL = Row(instruction="Say which colour.", input="It is red.", output="red")
CONVERSATION = parse_row(
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Red?"},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "Blue?"},
            {"role": "assistant", "content": "No."},
        ]
    },
    "f line 1",
)


DIALOGUE = Row(output="No.", messages=CONVERSATION.messages[1:])


@pytest.mark.parametrize(
    ("row", "template", "prompt"),
    [
        (FULL, "plain", "Say which colour.\nIt is red.\nAnswer:"),
        (Row(input="It is red.", output="red"), "plain", "It is red.\nAnswer:"),
        (Row(instruction="Say red.", output="red"), "plain", "Say red.\nAnswer:"),
        (Row(output="red"), "plain", "Answer:"),
        (CONVERSATION, "plain", "Be brief.\nUser: Red?\nAssistant: Yes.\nUser: Blue?\nAnswer:"),
        (DIALOGUE, "chat", "[user] Red?\n[assistant] Yes.\n[user] Blue?\n[assistant] "),
        (FULL, "chat", "[user] Say which colour.\nIt is red.\n[assistant] "),
        (Row(instruction="Say {red}.", output="red"), "auto", "[user] Say {red}.\n[assistant] "),
    ],
)
def test_prompts_read_as_documented(tokenizers, row, template, prompt):
    learned = f" {row.output}" if template == "plain" else row.output
    assert render(row, template=template, tokenizer=tokenizers["quiet_chat"]) == (prompt, learned)


def test_short_chat_under_plain_is_an_instruction(tokenizers):
    messages = (("system", "Be brief."), ("user", "Red?"), ("assistant", "Yes."))
    row = Row(output="Yes.", messages=messages)
    prompt, _ = render(row, template="auto", tokenizer=tokenizers["full"])
    assert prompt == "Be brief.\nRed?\nAnswer:"


def test_alpaca_has_two_forms(tokenizers):
    with_input, _ = render(FULL, template="alpaca", tokenizer=tokenizers["full"])
    without, _ = render(
        Row(instruction="Say {it}.", output="x"), template="alpaca", tokenizer=tokenizers["full"]
    )
    assert "### Instruction:\nSay which colour.\n\n### Input:\nIt is red.\n\n###" in with_input
    assert "### Instruction:\nSay {it}.\n\n### Response:\n" in without and "Input" not in without


def test_templates_that_cannot_be_are_refused(tokenizers):
    with pytest.raises(UserError, match=r"data.template is 'alpacca'.*Did you mean 'alpaca'"):
        render(FULL, template="alpacca", tokenizer=tokenizers["full"])
    with pytest.raises(UserError, match=r"tokenizer has no chat template; use 'auto', 'plain'"):
        render(FULL, template="chat", tokenizer=tokenizers["full"])
    with pytest.raises(UserError, match=r"refuses a row with the roles system, .*no system role"):
        render(CONVERSATION, template="chat", tokenizer=tokenizers["chat"])
    with pytest.raises(UserError, match=r"data.template is 'x'"):
        encode([], tokenizers["full"], template="x")


def test_labels_cover_exactly_the_answer_and_eos(tokenizer):
    rows = make_rows()
    examples, dropped = encode(rows, tokenizer)
    assert dropped == 0
    labels = collate([examples], pad_token_id=tokenizer.pad_token_id or 0).labels
    for row, example, row_labels in zip(rows, examples, labels.tolist(), strict=True):
        answer = learned_ids(tokenizer, row)
        start = example.prompt_length
        assert row_labels[start : start + len(answer)] == answer
        assert set(row_labels[:start] + row_labels[start + len(answer) :]) <= {IGNORE_INDEX}
        assert (example.answer, example.task) == (row.output, row.task)


def test_generation_sees_the_prompt_ids_of_training(tokenizer):
    examples, _ = encode(make_rows(), tokenizer, max_length=60)
    training = collate([examples], pad_token_id=0)
    generation = collate_prompts([examples], pad_token_id=0)
    assert (generation.labels == IGNORE_INDEX).all()
    for i, example in enumerate(examples):
        prompt = generation.input_ids[i, generation.attention_mask[i] == 1]
        assert torch.equal(prompt, training.input_ids[i, : example.prompt_length])
        hidden = training.labels[i, : example.prompt_length]
        assert (hidden == IGNORE_INDEX).all()


@pytest.mark.parametrize("template", ["auto", "plain", "alpaca"])
def test_prompt_ids_are_the_tokenizers_own(tokenizer, template):
    """A chat template writes all special tokens; elsewhere the tokenizer adds its own."""
    chat = template == "auto" and tokenizer.chat_template is not None
    for example in encode(make_rows(), tokenizer, template=template)[0]:
        own = tokenizer(example.prompt, add_special_tokens=not chat)["input_ids"]
        assert list(example.input_ids[: example.prompt_length]) == own


def test_the_chat_template_of_this_test_writes_bos_itself(tokenizers):
    prompt, _ = render(FULL, template="auto", tokenizer=tokenizers["chat"])
    assert prompt.startswith("<bos>[user]")


@pytest.mark.parametrize("max_length", [1, 8, 15, 20, 33, 50, 64, 100, 300])
@pytest.mark.parametrize("template", ["auto", "plain", "alpaca"])
def test_answers_and_instructions_are_never_cut(tokenizer, max_length, template):
    rows = make_rows()
    kept = 0
    for row in rows:
        example = encode_row(row, tokenizer=tokenizer, template=template, max_length=max_length)
        whole, _ = render(row, template=template, tokenizer=tokenizer)
        if example is None:
            continue
        kept += 1
        assert len(example.input_ids) <= max_length
        learned = learned_ids(tokenizer, row, template)
        assert list(example.input_ids[example.prompt_length :]) == learned
        if example.prompt != whole:
            head, tail = whole.split(row.input, maxsplit=1)
            assert example.prompt.startswith(head) and example.prompt.endswith(tail)
            cut = example.prompt[len(head) : len(example.prompt) - len(tail)]
            assert cut and row.input.startswith(cut)
    assert encode(rows, tokenizer, max_length, template)[1] == len(rows) - kept


def test_only_rows_that_cannot_fit_are_dropped(tokenizer):
    """Against a search over every length of the input, one character at a time."""
    rows = make_rows(9, seed=1)[:-1]
    for row in rows:
        lengths = []
        for end in range(min(1, len(row.input)), len(row.input) + 1):
            shorter = Row(instruction=row.instruction, input=row.input[:end], output=row.output)
            prompt, _ = render(shorter, template="auto", tokenizer=tokenizer)
            lengths.append(len(ids(tokenizer, prompt)) + len(learned_ids(tokenizer, row)))
        for max_length in (20, 40, 60):
            example = encode_row(row, tokenizer=tokenizer, template="auto", max_length=max_length)
            fits = [n for n in lengths if n <= max_length]
            if example is None:
                # Cutting is by whole tokens: the first token may be longer than one character.
                assert not fits or min(fits) > max_length - 4
            else:
                assert max(fits) - len(example.input_ids) <= 4


def test_batched_encoding_equals_one_row_at_a_time(tokenizer):
    rows = make_rows()
    singles = [encode_row(row, tokenizer=tokenizer, template="auto", max_length=20) for row in rows]
    examples, dropped = encode(rows, tokenizer, max_length=20)
    assert examples == [e for e in singles if e is not None]
    assert dropped == singles.count(None) > 0


def test_a_conversation_is_dropped_rather_than_cut(tokenizers):
    fits = len(encode([CONVERSATION], tokenizers["full"])[0][0].input_ids)
    assert encode([CONVERSATION], tokenizers["full"], max_length=fits)[1] == 0
    assert encode([CONVERSATION], tokenizers["full"], max_length=fits - 1) == ([], 1)


def test_inputs_are_cut_without_a_fast_tokenizer_too(tokenizers, monkeypatch):
    rows = make_rows()
    fast = encode(rows, tokenizers["full"], max_length=48)
    monkeypatch.setattr(type(tokenizers["full"]), "is_fast", property(lambda self: False))
    slow = encode(rows, tokenizers["full"], max_length=48)
    assert slow[1] <= fast[1] and all(len(e.input_ids) <= 48 for e in slow[0])


def test_a_text_without_any_token_is_never_learned_and_never_cut():
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate("Answer: d")}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    rows = [Row(output="漢"), Row(output="red"), Row(input="漢", output="red")]
    examples, dropped = encode(rows, tokenizer)
    assert dropped == 1 and [len(e.input_ids) for e in examples] == [8 + 3] * 2
    assert encode(rows, tokenizer, max_length=10) == ([], 3)


def test_max_length_below_one_is_refused(tokenizers):
    with pytest.raises(UserError, match=r"train.max-length is 0, expected at least 1"):
        encode([FULL], tokenizers["full"], max_length=0)


def make_slots(counts, seed=0):
    draw = random.Random(seed)

    def example():
        length = draw.randint(2, 12)
        return Example(
            input_ids=tuple(draw.choices(range(5, 90), k=length)),
            prompt_length=draw.randint(1, length - 1),
            prompt="",
            answer="",
        )

    return [[example() for _ in range(count)] for count in counts]


@pytest.mark.parametrize("build", [collate, collate_prompts])
@pytest.mark.parametrize("counts", [(3, 3, 3), (1, 4, 2), (0, 2), (5,), (2, 0, 0, 1)])
def test_a_slot_of_a_batch_is_its_own_batch_up_to_padding(build, counts):
    slots = make_slots(counts)
    batch = build(slots, pad_token_id=3)
    per_slot, width = max(counts), max(batch.lengths_per_slot)
    assert batch.input_ids.shape == (len(counts) * per_slot, width)
    assert batch.rows_per_slot == counts
    for k, slot in enumerate(slots):
        if not slot:
            assert batch.lengths_per_slot[k] == 0
            continue
        alone = build([slot], pad_token_id=3)
        length = batch.lengths_per_slot[k]
        assert alone.lengths_per_slot == (length,)
        rows = slice(k * per_slot, k * per_slot + len(slot))
        own = slice(width - length, None) if build is collate_prompts else slice(0, length)
        pad = slice(0, width - length) if build is collate_prompts else slice(length, None)
        for field in ("input_ids", "attention_mask", "labels"):
            assert torch.equal(getattr(batch, field)[rows, own], getattr(alone, field))
        assert (batch.input_ids[rows, pad] == 3).all()
        assert (batch.attention_mask[rows, pad] == 0).all()
        assert (batch.labels[rows, pad] == IGNORE_INDEX).all()


def test_dummy_rows_are_copies_of_a_row_without_labels():
    counts = (1, 4, 0)
    slots = make_slots(counts)
    training = collate(slots, pad_token_id=3)
    generation = collate_prompts(slots, pad_token_id=3)
    dummies = [k * 4 + i for k, count in enumerate(counts) for i in range(count, 4)]
    for batch in (training, generation):
        assert (batch.labels[dummies] == IGNORE_INDEX).all()
        assert (batch.input_ids[dummies] == batch.input_ids[0]).all()
        assert (batch.attention_mask[dummies] == batch.attention_mask[0]).all()
    assert (training.labels != IGNORE_INDEX).any(dim=1).sum() == sum(counts)


def test_slots_without_any_example_are_refused():
    with pytest.raises(ValueError, match="2 slots without any example"):
        collate([[], []], pad_token_id=0)


@pytest.mark.parametrize(("num_examples", "batch_size"), [(10, 4), (8, 4), (3, 8), (1, 1)])
def test_an_epoch_of_the_plan_meets_every_example_once(num_examples, batch_size):
    per_epoch = -(-num_examples // batch_size)
    plan = batch_plan(num_examples, batch_size=batch_size, steps=3 * per_epoch, seed_parts=(0, "x"))
    assert len(plan) == 3 * per_epoch and all(len(batch) <= batch_size for batch in plan)
    for epoch in range(3):
        batches = plan[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert Counter(i for batch in batches for i in batch) == Counter(range(num_examples))


def test_the_plan_is_its_seed_parts_and_longer_plans_begin_with_shorter_ones():
    def plan(steps, *parts):
        return batch_plan(20, batch_size=3, steps=steps, seed_parts=parts)

    assert plan(30, 0, "batches", 1, "a") == plan(30, 0, "batches", 1, "a")
    assert plan(30, 0, "batches", 1, "a")[:11] == plan(11, 0, "batches", 1, "a")
    others = [(1, "batches", 1, "a"), (0, "batches", 2, "a"), (0, "batches", 1, "b")]
    assert all(plan(7, *parts) != plan(7, 0, "batches", 1, "a") for parts in others)
    assert plan(0, 0) == [] and plan(14, 0)[:7] != plan(14, 0)[7:]


@pytest.mark.parametrize("wrong", [{"num_examples": 0}, {"batch_size": 0}, {"steps": -1}])
def test_plans_of_nothing_are_refused(wrong):
    numbers = {"num_examples": 4, "batch_size": 2, "steps": 3} | wrong
    with pytest.raises(ValueError, match="Skip clients without rows"):
        batch_plan(numbers.pop("num_examples"), **numbers, seed_parts=(0,))
