"""Models that transformers' attention interface carries are served right; others are refused."""

from types import SimpleNamespace

import pytest
import torch

from family_checks import build
from family_configs import families
from flexlora.errors import UserError
from flexlora.lora.peft_folder import save_adapter
from flexlora.serving.model_checks import length_limit
from flexlora.training.base_model import BaseModel
from flexlora.training.models import load_base
from flexlora.training.targets import choose_targets
from served import asked, drained, engine_of, generated, prompts, strong_adapter

# Windows of 8 tokens, capped scores, sinks, shared key heads, learned positions, experts, MLA.
SERVED = ("gpt2", "gpt_neox", "gemma2", "gpt_oss", "mistral", "mixtral", "deepseek_v3", "opt")
REFUSED = {"bloom": "packed prompts change", "mamba": "packed prompts change"}


class Letters:
    """A tokenizer without special tokens."""

    eos_token_id = pad_token_id = bos_token_id = None

    def decode(self, ids, **_):
        return "".join(chr(97 + i % 26) for i in ids)


def base_of(name):
    model = build(name)
    model.generation_config.eos_token_id = None
    device = torch.device("cpu")
    return BaseModel(name=name, model=model, tokenizer=Letters(), fingerprint="", device=device)


@pytest.mark.nightly
@pytest.mark.parametrize("name", families())
def test_every_family_of_transformers_is_served_right_or_refused(name):
    try:
        base, questions = base_of(name), prompts(4, seed=1, longest=24)
        answers = [generated(base.model, question, 10) for question in questions]
    except Exception as error:  # transformers' own, as in docs/families.md
        pytest.skip(f"the tiny model cannot be made or run: {error}")
    try:
        with engine_of(base, {}) as engine:
            readers = [
                asked(engine, str(i), q, None, max_tokens=10) for i, q in enumerate(questions)
            ]
            drained(engine)
    except UserError as error:
        assert "cannot be" in str(error) or "none of the" in str(error)
        return
    assert [reader.tokens for reader in readers] == answers


@torch.no_grad()
def logits(base):
    return base.model(input_ids=torch.tensor([[20, 30, 40]])).logits


def merged(base, adapter):
    """The base's model with the adapter's products in its weights."""
    model = base_of(base.name).model
    for name, factors in adapter.items():
        linear = model.get_submodule(name)
        delta = factors.delta_weight()
        linear.weight.add_(delta.T if type(linear).__name__ == "Conv1D" else delta)
    return model


@pytest.mark.parametrize("name", SERVED)
def test_answers_are_those_of_generate_with_the_adapter_merged_in(name):
    base = base_of(name)
    shapes = choose_targets(base.model, "all-linear").shapes
    adapters = {"low": strong_adapter(shapes, 2, 1), "high": strong_adapter(shapes, 7, 2)}
    questions = prompts(3, seed=2, longest=24)
    with engine_of(base, adapters, prefill_tokens=16) as engine:
        readers = {
            (adapter, q): asked(engine, f"{adapter}{q}", prompt, adapter, max_tokens=10)
            for adapter in (None, *adapters)
            for q, prompt in enumerate(questions)
        }
        drained(engine)
    answers = {}
    for adapter in (None, *adapters):
        model = merged(base, adapters[adapter]) if adapter else base.model
        answers |= {(adapter, q): generated(model, p, 10) for q, p in enumerate(questions)}
    assert {key: reader.tokens for key, reader in readers.items()} == answers
    assert len({tuple(tokens) for tokens in answers.values()}) > 6, "the control: they differ"


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_packed_are_refused_and_left_as_they_were(name):
    base = base_of(name)
    before = logits(base)
    with (
        pytest.raises(UserError, match=rf"'{name}' cannot be served \({REFUSED[name]}"),
        engine_of(base, {}),
    ):
        pass
    assert torch.equal(logits(base), before)


def test_a_window_that_only_a_mask_would_show_is_refused():
    """The trial's prompts are shorter than any window."""
    base = base_of("llama")
    base.model.config.layer_types = ["full_attention", "sliding_attention"]
    with (
        pytest.raises(UserError, match="its layer 1 does not name its window"),
        engine_of(base, {}),
    ):
        pass
    base.model.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(UserError, match="its layer 1 is 'chunked_attention'"), engine_of(base, {}):
        pass


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        ({"rope_type": "default"}, 4096),
        ({"rope_type": "yarn", "original_max_position_embeddings": 512}, 4096),
        ({"rope_type": "longrope", "original_max_position_embeddings": 512}, 512),
        ({"full_attention": {"rope_type": "dynamic"}}, 4096),
    ],
)
def test_angles_that_depend_on_the_longest_row_limit_the_length(rope, longest):
    config = SimpleNamespace(rope_parameters=rope, max_position_embeddings=4096)
    base = SimpleNamespace(model=SimpleNamespace(config=config), max_positions=4096)
    assert length_limit(base) == longest


def test_an_nf4_base_is_served_as_peft_uses_it(tmp_path):
    """bitsandbytes' Linear4bit under the served layers."""
    from peft import PeftModel

    def load():
        return load_base("embedded", device="cpu", fresh=True, quantization="nf4")

    base, questions = load(), prompts(2, seed=1)
    adapter = strong_adapter(choose_targets(base.model, "all-linear").shapes, 9, 9)
    save_adapter(adapter, tmp_path, base="x")
    with engine_of(base, {"mine": adapter}) as engine:
        readers = [asked(engine, str(i), p, "mine", max_tokens=8) for i, p in enumerate(questions)]
        drained(engine)
    peft = PeftModel.from_pretrained(load().model, tmp_path).eval()
    for reader, question in zip(readers, questions, strict=True):
        assert reader.tokens == generated(peft, question, 8, {2})
