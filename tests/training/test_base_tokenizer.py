"""The tokenizer of a base: missing, empty, damaged, or implemented in its folder: one sentence."""

import json

import pytest

import bases
from flexlora.errors import UserError
from flexlora.training.base_model import BaseModel
from flexlora.training.models import load_base


def described(folder, **changes):
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def without(*names, **changes):
    def change(folder):
        described(folder, **changes)
        for name in names:
            (folder / name).unlink()

    return change


BROKEN = {
    "none": (without("tokenizer.json", "tokenizer_config.json"), "is missing; expected tokenizer."),
    "no vocabulary": (without("tokenizer.json"), "is missing; expected tokenizer.json, tokenizer."),
    "a class without its files": (
        without("tokenizer.json", tokenizer_class="LlamaTokenizer"),
        r"\(LlamaTokenizer\) makes no tokens of English text; does the folder lack tokenizer.json",
    ),
    "another class without its files": (
        without("tokenizer.json", tokenizer_class="GPT2Tokenizer"),
        r"\(GPT2Tokenizer\) makes no tokens of English text",
    ),
    "half a file": (
        lambda folder: (folder / "tokenizer.json").write_text("{"),
        "of model .* cannot be loaded: ",
    ),
    "code in the folder": (
        without(
            tokenizer_class="XTokenizer", auto_map={"AutoTokenizer": ["tokenization_x.XT", None]}
        ),
        r"needs code in the folder \(auto_map in tokenizer_config.json\), which FlexLoRA never",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_tokenizer_that_cannot_be_used_is_refused(kind, tmp_path, monkeypatch):
    change, message = BROKEN[kind]
    folder = bases.copied(tmp_path / "m")
    (folder / "tokenization_x.py").write_text("raise SystemExit('the code of a folder was run')\n")
    change(folder)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question at the terminal"))
    with pytest.raises(UserError, match=message) as refusal:
        load_base(str(folder), device="cpu", fresh=True)
    assert str(folder) in str(refusal.value) and "\n" not in str(refusal.value)


def test_padding_is_an_id_that_the_model_has():
    base = load_base("embedded", device="cpu")
    assert (base.vocab_size, base.pad_token_id) == (529, base.tokenizer.pad_token_id)

    class Tokenizer:
        pad_token_id: int | None = None

    for given, used in ((None, 0), (528, 528), (529, 0), (-1, 0)):
        Tokenizer.pad_token_id = given
        other = BaseModel(
            name="x", model=base.model, tokenizer=Tokenizer(), fingerprint="", device=base.device
        )
        assert other.pad_token_id == used
