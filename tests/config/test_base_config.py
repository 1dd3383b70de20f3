"""Bases that are refused by their ``config.json`` and their folder's files, before any weight."""

import json
import subprocess
import sys

import pytest

import bases
from federation import small
from flexlora.config.base_config import base_config
from flexlora.config.paths import EMBEDDED, resolve_name
from flexlora.errors import UserError
from flexlora.planning.model_config import read_shape
from flexlora.server.settings import check_config

NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
ONE_FILE = {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}
OTHER_REPO = {"AutoConfig": "owner/other--configuration_y.YConfig", "AutoTokenizer": ["t.T", None]}

REFUSED = {
    "4-bit": ({"quantization_config": NF4}, r"quantized already \(bitsandbytes 4-bit.*=nf4 rounds"),
    "8-bit": (
        {"quantization_config": {"load_in_8bit": True, "quant_method": "bitsandbytes"}},
        r"bitsandbytes 8-bit, .*model.quantization=8bit rounds while loading",
    ),
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"\(gptq, .*made from"),
    "fp8": ({"quantization_config": {"quant_method": "fp8"}}, r"\(fp8, .*dequantize it"),
    "mxfp4 within": (
        {"text_config": {"quantization_config": {"quant_method": "mxfp4"}}},
        r"\(mxfp4, by quantization_config",
    ),
    "an unnamed method": ({"quantization_config": {"bits": 4}}, r"\(an unknown method, "),
    "own code": (
        {"model_type": "my_llama", "auto_map": ONE_FILE},
        r"'my_llama', which transformers .* \(modeling_x.py, named by auto_map.*never runs",
    ),
    "code of another repository": (
        {"model_type": "lama", "auto_map": OTHER_REPO},
        r"\(configuration_y.py, t.py, .*Did you mean 'llama'",
    ),
    "no model_type": ({"model_type": None}, "has no model_type in its config.json"),
    "a model_type that is a number": ({"model_type": 3}, "has no model_type in its config.json"),
    "an encoder-decoder": (
        {"model_type": "t5", "is_encoder_decoder": True},
        "an encoder with a decoder .'t5', is_encoder_decoder.*a decoder alone",
    ),
    "an assistant": (
        {"model_type": "gemma4_assistant"},
        "'gemma4_assistant', which drafts tokens from the states of another model",
    ),
    "bidirectional": ({"use_bidirectional_attention": True}, "is bidirectional .use_bidir"),
    "bidirectional within": (
        {"text_config": {"use_bidirectional_attention": "all"}},
        "is bidirectional .use_bidir",
    ),
    "a classifier": (
        {"architectures": ["LlamaForSequenceClassification"]},
        "is a LlamaForSequenceClassification .architectures.*next token; expected a causal",
    ),
    "a reward model": ({"architectures": ["Qwen2ForRewardModel"]}, "is a Qwen2ForRewardModel"),
    "a masked model": ({"architectures": ["BertForMaskedLM"]}, "is a BertForMaskedLM"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_base_that_its_configuration_rules_out_is_refused_alike_everywhere(kind, tmp_path):
    changes, message = REFUSED[kind]
    folder = bases.configured(bases.copied(tmp_path / "m"), **changes)
    (folder / "model.safetensors").unlink()  # nobody gets as far as the weights
    causes = set()
    for reader in (
        base_config,
        read_shape,  # flexlora plan, client init
        lambda name: check_config(small(model__name=name)),  # flwr run's server
    ):
        with pytest.raises(UserError, match=message) as refusal:
            reader(str(folder))
        causes.add(str(refusal.value))
    assert len(causes) == 1 and str(folder) in causes.pop()


def test_what_transformers_has_itself_is_not_refused_for_the_code_beside_it(tmp_path):
    """Microsoft's Phi-3 names code of its own; transformers' class is what is loaded."""
    folder = bases.copied(tmp_path / "m")
    bases.configured(folder, auto_map=ONE_FILE, quantization_config={}, is_encoder_decoder=False)
    bases.configured(folder, use_bidirectional_attention=False, architectures=["LlamaForCausalLM"])
    assert base_config(str(folder))["auto_map"] == ONE_FILE
    assert read_shape(str(folder)).num_layers == 4


def test_an_adapter_beside_the_base_is_refused_by_file(tmp_path):
    folder = bases.copied(tmp_path / "m")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"adapter \(adapter_config.json\) beside the base.*move"):
        base_config(str(folder))


TEXTS = {
    "a byte-order mark": ("\ufeff{}", "starts with a byte-order mark; save it as UTF-8 without"),
    "half a file": ('{"model_type": "ll', "config.json' cannot be read as JSON"),
    "not an object": ("[]", "holds list, expected an object of keys"),
    "deep": ("[" * 100_000, "cannot be read as JSON"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_a_config_json_that_cannot_be_read_is_refused_by_file(kind, tmp_path):
    text, message = TEXTS[kind]
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message) as refusal:
        base_config(str(tmp_path))
    assert str(tmp_path / "config.json") in str(refusal.value)


def test_bytes_that_are_no_text_are_refused_by_file(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{\x00}\x00")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        base_config(str(tmp_path))


FOLDERS = {
    "an empty folder": ({}, "is empty, so it has no config.json"),
    "an adapter alone": (
        {"adapter_config.json": json.dumps({"base_model_name_or_path": "owner/base"})},
        r"adapter .adapter_config.json.; give the folder or hub name of its base, 'owner/base'",
    ),
    "an adapter without its base": ({"adapter_config.json": "["}, "give the folder of its base"),
    "a GGUF file": ({"model-q4.gguf": ""}, "a GGUF file; give '.*model-q4.gguf'"),
    "a trainer's output": (
        {"checkpoint-9/config.json": "{}", "trainer_state.json": "{}"},
        "has no config.json, but its folder 'checkpoint-9' has one; give that",
    ),
    "something else": ({"thesis.tex": ""}, r"has no config\.json; is it a model folder\?"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_without_a_config_json_is_refused_by_what_it_holds(kind, tmp_path):
    files, message = FOLDERS[kind]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        resolve_name(str(tmp_path))


def test_reading_a_base_loads_neither_torch_nor_transformers():
    code = (
        "import sys\n"
        "from flexlora.config.base_config import base_config\n"
        f"base_config({str(EMBEDDED)!r})\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
