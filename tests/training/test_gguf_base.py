"""A base that is a GGUF file is the model it was made from, and trains as it does."""

import json

import pytest
import torch

from bases import saved
from builders import tiny_config
from flexlora.config.base_config import base_config
from flexlora.config.paths import resolve_name
from flexlora.errors import UserError
from flexlora.planning.model_config import read_shape
from flexlora.training.models import load_base
from small_tokenizers import byte_bpe

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny Llama with a byte-level BPE as a folder and as a GGUF file, and an own cache."""
    from transformers import AutoModelForCausalLM

    from flexlora.deploy.gguf.metadata import Description
    from flexlora.deploy.gguf.model_file import write_model

    root = tmp_path_factory.mktemp("gguf-base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        config = tiny_config("llama", 32)
        config.vocab_size = 400
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).float()
        folder = saved(root / "folder", model)
        tokenizer = byte_bpe(bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<u>")
        tokenizer.save_pretrained(folder)
        about = Description(name="tiny", text="", license="", base="tiny")
        write_model(model, tokenizer, root / "m.gguf", numbers="f32", description=about)
        yield root


def test_a_gguf_base_is_the_folder_it_was_made_from(made):
    folder, file = str(made / "folder"), str(made / "m.gguf")
    ours, theirs = (load_base(name, device="cpu") for name in (file, folder))
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        assert torch.equal(ours.model(input_ids=ids).logits, theirs.model(input_ids=ids).logits)
    text = "red Answer: it's über 漢字 12345\n  seven</s>"
    assert ours.tokenizer(text).input_ids == theirs.tokenizer(text).input_ids
    assert ours.fingerprint == theirs.fingerprint
    assert read_shape(file).num_parameters == read_shape(folder).num_parameters
    assert resolve_name(file).startswith(str(made / "cache"))


def test_another_file_of_the_same_name_is_another_base(made, tmp_path):
    file = tmp_path / "m.gguf"
    file.write_bytes((made / "m.gguf").read_bytes())
    first = resolve_name(str(file))
    file.write_bytes((made / "m.gguf").read_bytes() + b"\0" * 32)
    assert resolve_name(str(file)) != first


def test_bad_files_are_refused(made, tmp_path, monkeypatch):
    def refused(name, match):
        with pytest.raises(UserError, match=match):
            base_config(str(tmp_path / name))

    refused("none.gguf", "a GGUF file that does not exist")
    (tmp_path / "text.gguf").write_text("hello")
    refused("text.gguf", "is not a GGUF file: it begins with b'hell'")
    (tmp_path / "cut.gguf").write_bytes((made / "m.gguf").read_bytes()[:200])
    refused("cut.gguf", "is damaged or cut short")
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "nobody")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused("odd.gguf", "architecture 'nobody', which transformers does not load")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    refused("odd.gguf", "pip install 'flexlora.gguf.'")


def test_a_run_on_a_gguf_base_learns(made, tmp_path):
    from federation import small
    from flexlora.simulations.simulate import simulate

    config = small(model__name=str(made / "m.gguf"), num_server_rounds=1)
    simulate(config, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["eval_loss"] for line in lines]
    assert losses[1] < losses[0]
