"""Encoders that open as decoders see the answer they should predict: the model itself is asked."""

import pytest
import torch

import bases
from flexlora.errors import UserError
from flexlora.training.models import load_base
from flexlora.training.targets import find_targets

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
XLM = {"vocab_size": 64, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}
XLNET = {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}
GEMMA = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8}


def model(kind, dtype="float32", **changes):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()


LOOKING_AHEAD = {
    "bert": SIZES,
    "roberta": SIZES,
    "electra": {**SIZES, "embedding_size": 32},
    "roformer": SIZES,
    "megatron-bert": SIZES,
    "xlm": XLM,
    "xlnet": XLNET,
    "gemma3_text": {**GEMMA, "use_bidirectional_attention": True},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", LOOKING_AHEAD)
def test_a_model_that_sees_later_tokens_is_refused(kind, dtype):
    message = r"cannot be trained: a token sees the tokens after it"
    if kind == "xlnet":  # its rows come second; in bfloat16 it mixes dtypes
        message = "'xlnet' that it matches can have LoRA|'xlnet' cannot be trained"
    with pytest.raises(UserError, match=message):
        find_targets(model(kind, dtype, **LOOKING_AHEAD[kind]), "all-linear")


CAUSAL = {
    "bert": {**SIZES, "is_decoder": True},
    "roberta": {**SIZES, "is_decoder": True},
    "electra": {**SIZES, "embedding_size": 32, "is_decoder": True},
    "xlm": {**XLM, "causal": True},
    "gemma3_text": GEMMA,
    "gpt_neox": SIZES,  # its is_decoder is false and means nothing
    "bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mamba": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "mixtral": {**SIZES, "num_key_value_heads": 2, "num_local_experts": 4},
    "xglm": {"vocab_size": 64, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", CAUSAL)
def test_a_decoder_is_not(kind, dtype):
    decoder = model(kind, dtype, **CAUSAL[kind])
    assert find_targets(decoder, "all-linear")
    assert not any(module._forward_hooks for module in decoder.modules())
    assert all(parameter.grad is None for parameter in decoder.parameters())


def test_what_cannot_run_a_row_of_text_is_refused():
    broken = model("mixtral", **CAUSAL["mixtral"])
    broken.model.layers[0].self_attn.q_proj = torch.nn.Linear(7, 32)
    with pytest.raises(UserError, match=r"'mixtral' cannot be trained: a pass of text alone fails"):
        find_targets(broken, "all-linear")
    assert not any(module._forward_hooks for module in broken.modules())


def test_an_encoder_on_disk_is_refused(tmp_path):
    folder = bases.saved(tmp_path, model("roberta", **SIZES))
    with pytest.raises(UserError, match=r"'roberta' cannot be trained: a token sees the tokens"):
        find_targets(load_base(str(folder), device="cpu", fresh=True).model, "all-linear")
    bases.configured(folder, is_decoder=True)
    base = load_base(str(folder), device="cpu", fresh=True)
    assert base.max_positions == 64
    assert find_targets(base.model, "all-linear")


def test_a_multimodal_checkpoint_is_asked_for_its_language_model(tmp_path):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {"image_size": 28, "patch_size": 14, **{k: SIZES[k] for k in list(SIZES)[1:5]}}
    config = Gemma3Config(
        text_config={**GEMMA, "sliding_window": 16},
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=60,
        boi_token_index=61,
        eoi_token_index=62,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        folder = bases.saved(tmp_path, Gemma3ForConditionalGeneration(config))
    base = load_base(str(folder), device="cpu", fresh=True)
    assert (base.vocab_size, base.max_positions, base.pad_token_id) == (64, 64, 0)
    first = base.fingerprint

    def another_tower(tensors):
        name = next(name for name in tensors if "vision" in name and "mlp.fc1.weight" in name)
        tensors[name] += 1

    bases.with_tensors(folder, another_tower)
    assert load_base(str(folder), device="cpu", fresh=True).fingerprint != first
