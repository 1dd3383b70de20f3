"""The bytes of tokens, joined, are the bytes of the text."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flexlora.serving.api.token_bytes import TokenBytes
from flexlora.training.models import load_base
from small_tokenizers import byte_bpe

TEXT = "Say über 漢字 \N{THUMBS UP SIGN}\n\tred"


def word_pieces():
    """SentencePiece's way: a word mark, and bytes for what is not in the vocabulary."""
    pieces = ["\u2581red", "\u2581", *(f"<0x{byte:02X}>" for byte in range(256))]
    core = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True
        )
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.mark.parametrize("kind", ["byte BPE", "embedded", "word pieces"])
def test_the_bytes_of_the_tokens_are_the_text(kind):
    tokenizer = {
        "byte BPE": lambda: byte_bpe(eos_token="</s>"),
        "embedded": lambda: load_base("embedded").tokenizer,
        "word pieces": word_pieces,
    }[kind]()
    text = "Say red, 12 times." if kind == "embedded" else TEXT
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = b"".join(map(TokenBytes(tokenizer), ids)).decode()
    assert found.removeprefix(" " if kind == "word pieces" else "") == text
    assert len(ids) > 3


def test_every_byte_is_one_letter_of_a_byte_level_vocabulary():
    tokenizer = byte_bpe(eos_token="</s>")
    token_bytes = TokenBytes(tokenizer)
    letters = tokenizer.convert_tokens_to_ids(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(token_bytes(token_id)[0] for token_id in letters) == list(range(256))


def test_added_tokens_are_their_text_and_unknown_ids_are_nothing():
    tokenizer = byte_bpe(eos_token="</s>")
    token_bytes = TokenBytes(tokenizer)
    assert token_bytes(tokenizer.eos_token_id) == b"</s>"
    assert token_bytes(10**6) == b""
