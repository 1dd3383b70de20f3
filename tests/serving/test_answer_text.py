"""Text as it comes: whole characters, nothing of a stop text, and in the end all of it."""

from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from flexlora.serving.answer_text import AnswerText, Detokenizer
from flexlora.training.models import load_base
from small_tokenizers import byte_bpe

BYTES = byte_bpe(pad_token="<pad>", bos_token="<s>", eos_token="</s>")
EMBEDDED = load_base("embedded", device="cpu").tokenizer
TEXT = st.text(st.sampled_from("ab cé漢字🙂\n ü👩‍👩‍👧"), max_size=20)


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def sentence_pieces():
    """A tokenizer whose decoder takes the space at the start of a text away, as Llama 2's."""
    words = [
        "<pad>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581a",
        "\u2581be",
        "c",
        "\u2581",
    ]
    core = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>")


PIECES = sentence_pieces()


def pieces_of(tokenizer, ids, stops=(), context=()):
    """The text after each token, and what is held back at the end."""
    text = AnswerText(Detokenizer(tokenizer, {tokenizer.pad_token_id}, context), stops)
    pieces = []
    for token in ids:
        pieces.append(text.add(token))
        if text.stopped:
            break
    return [*pieces, text.finish()]


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("tokenizer", [BYTES, EMBEDDED], ids=["bytes", "embedded"])
@given(text=TEXT, repeats=st.integers(1, 8))
def test_the_pieces_are_the_text_and_no_character_is_broken(tokenizer, text, repeats):
    ids = ids_of(tokenizer, text * repeats)
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == decoded(tokenizer, ids)
    if tokenizer is BYTES:
        assert "\ufffd" not in "".join(pieces)


@given(ids=st.lists(st.integers(3, 255), max_size=80))
def test_any_bytes_come_out_as_the_tokenizer_writes_them_at_once(ids):
    """Invalid UTF-8 too, over more tokens than are decoded at once."""
    assert "".join(pieces_of(BYTES, ids)) == decoded(BYTES, ids)


@given(
    ids=st.lists(st.sampled_from([257, 258, 259, 260]), min_size=2, max_size=60),
    cut=st.integers(1, 60),
)
def test_an_answer_continues_its_prompt_with_the_space_between_them(ids, cut):
    """SentencePiece's decoders drop the space at the start of a text: an answer is no start."""
    prompt, answer = ids[:cut], ids[cut:]
    found = "".join(pieces_of(PIECES, answer, context=prompt[-8:]))
    assert decoded(PIECES, prompt) + found == decoded(PIECES, ids)


def test_a_character_that_the_prompt_leaves_open_is_the_answers():
    ids = ids_of(BYTES, "a🙂b")
    assert pieces_of(BYTES, ids[3:], context=ids[:3]) == ["", "🙂", "b", ""]
    space = [257, 258]
    assert pieces_of(PIECES, space[1:], context=space[:1]) == [" be", ""]
    assert pieces_of(PIECES, space[1:]) == ["be", ""], "the control: without the prompt"


def test_a_character_comes_with_its_last_token():
    ids = ids_of(BYTES, "a🙂b")
    assert len(ids) == 6
    assert pieces_of(BYTES, ids) == ["a", "", "", "", "🙂", "b", ""]
    assert pieces_of(BYTES, ids[:3]) == ["a", "", "", "\ufffd"], "cut inside: as decode writes it"


def test_padding_has_no_text():
    assert "".join(pieces_of(BYTES, [BYTES.pad_token_id, *ids_of(BYTES, "x")])) == "x"


@given(
    text=st.text("abc", max_size=24),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    sizes=st.lists(st.integers(1, 3), min_size=24, max_size=24),
)
def test_the_answer_ends_before_the_first_stop_text_however_tokens_cut_it(text, stops, sizes):
    cuts = [0, *accumulate(sizes)]
    parts = [text[start:stop] for start, stop in pairwise(cuts) if start < len(text)]
    answer = AnswerText(Detokenizer(Parts(parts), set()), stops)
    found = ""
    for token in range(len(parts)):
        found += answer.add(token)
        assert not any(stop in found for stop in stops)
        if answer.stopped:
            break
    found += answer.finish()
    ends = [at for stop in stops if (at := text.find(stop)) >= 0]
    if not ends:
        assert found == text
        return
    assert answer.stopped
    assert text.startswith(found)
    assert not any(stop in found for stop in stops)
    assert any(text[len(found) :].startswith(stop) for stop in stops)


class Parts:
    """A tokenizer whose token i is ``parts[i]``."""

    def __init__(self, parts):
        self.parts = parts

    def decode(self, ids, **_):
        return "".join(self.parts[i] for i in ids)


def test_what_may_begin_a_stop_text_is_held_back():
    assert pieces_of(BYTES, ids_of(BYTES, "a\n\nb"), ["\n\nUser"])[0] == "a"
    ids = [ids_of(BYTES, c)[0] for c in "xUsey"]
    assert pieces_of(BYTES, ids, ["User:"]) == ["x", "", "", "", "Usey", ""]
    ids = [ids_of(BYTES, c)[0] for c in "xUse"]
    assert pieces_of(BYTES, ids, ["User:"]) == ["x", "", "", "", "Use"], "the answer ends in it"
