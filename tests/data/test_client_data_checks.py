"""What is refused before the first row is encoded, and padding that the model does not know."""

from types import SimpleNamespace

import pytest
import torch

from flexlora.config.resolve import Config
from flexlora.data.clients import ClientData
from flexlora.data.rows import Row, parse_row
from flexlora.data.vocabulary import check_vocabulary, max_token_id
from flexlora.errors import UserError
from flexlora.server.settings import check_config
from flexlora.simulations.terminal import TerminalObserver
from flexlora.training.models import BaseModel
from small_tokenizers import CHATML, GEMMA, byte_bpe

ROWS = {"a": {"train": [Row(instruction="Say red.", output="red")], "test": []}}
SPOKEN = Row(output="Yes.", messages=(("system", "B."), ("user", "Red?"), ("assistant", "Yes.")))


@pytest.fixture
def tokenizer():
    return byte_bpe(bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def data(tokenizer, rows=ROWS, **options):
    options = {"template": "auto", "max_length": 99} | options
    return ClientData(rows, tokenizer=tokenizer, **options)


def test_a_split_that_the_template_refuses_is_refused_at_once(tokenizer):
    tokenizer.chat_template = GEMMA
    data(tokenizer)
    with pytest.raises(UserError, match="roles system, user"):
        data(tokenizer, {**ROWS, "b": {"train": [], "validation": [SPOKEN]}})
    tokenizer.chat_template = {"rag": CHATML, "tool_use": CHATML}
    with pytest.raises(UserError, match="none is called 'default'"):
        data(tokenizer, {"a": {"train": []}})


def test_a_token_that_the_model_does_not_embed_is_refused_by_name(tokenizer):
    known = len(tokenizer)
    tokenizer.add_tokens(["<new>", "<unused>"])
    assert max_token_id(tokenizer) == known + 1
    assert data(tokenizer, vocabulary=known).examples("a", "train")
    strange = {"b": {"train": ROWS["a"]["train"] * 3, "test": [Row(output="<new> x")]}}
    with pytest.raises(UserError, match=rf"client 'b', test rows: .*'<new>' \(id {known}\)"):
        data(tokenizer, strange, vocabulary=known)
    assert data(tokenizer, strange, vocabulary=known + 2).examples("b", "test")
    examples = data(tokenizer, strange).examples("b", "test")
    with pytest.raises(UserError, match=f"embeds ids below {known} only"):
        check_vocabulary(examples, known, tokenizer)


def test_a_template_that_writes_a_token_unknown_to_the_model_is_refused(tokenizer):
    known = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    with pytest.raises(UserError, match=r"'<\|im_start\|>'.*or the template"):
        data(tokenizer, vocabulary=known)


@pytest.mark.parametrize(
    ("pad", "expected"), [(None, 0), (3, 3), (7, 7), (8, 0), (500, 0), (-1, 0)]
)
def test_padding_is_an_id_that_the_model_embeds(pad, expected):
    model = torch.nn.Module()
    model.get_input_embeddings = lambda: torch.nn.Embedding(8, 2)
    named = {"name": "m", "fingerprint": "", "device": torch.device("cpu")}
    base = BaseModel(model=model, tokenizer=SimpleNamespace(pad_token_id=pad), **named)
    assert base.pad_token_id == expected and base.vocab_size == 8


def test_the_day_of_the_templates_is_checked_with_the_configuration():
    check_config(Config.resolve(sets=("data.template-date=2026-03-02",)))
    with pytest.raises(UserError, match=r"data.template-date is '2.3.2026', expected a day"):
        check_config(Config.resolve(sets=("data.template-date=2.3.2026",)))


def test_the_terminal_says_which_keys_foreign_rows_were_read_from(tokenizer):
    from rich.console import Console

    history = {"instruction": "And now?", "output": "blue", "history": [["First?", "red"]]}
    rows = [parse_row(history, "f line 1"), *ROWS["a"]["train"]]
    console = Console(width=100)
    with console.capture() as shown:
        TerminalObserver(console).read(data(tokenizer, {"a": {"train": rows}}).foreign_layouts())
    assert shown.get() == "1 rows were read from instruction, output, history.\n"
