# ruff: noqa: E501 (the tables)
"""Tiny configurations of every causal language model of transformers, by rules and exceptions.

A rule sets a key wherever the family's default configuration has it, in nested configurations
too; an exception is what a family wants beside the rules. ``family#variant`` names a second
configuration of a family.
"""

from __future__ import annotations

from transformers import CONFIG_MAPPING, AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB = 529
LAYERS = 2

# fmt: off
RULES = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "n_vocab", "decoder_vocab_size"), VOCAB),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embed_dim", "embedding_size", "lru_width",
                     "attention_hidden_size", "ffn_hidden_size_", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_inner", "decoder_ffn_dim", "encoder_ffn_dim", "dff",
                     "ffn_hidden_size", "intermediate_size_mlp", "block_ff_dim", "feed_forward_size", "dim_ff",
                     "shared_intermediate_size", "dense_intermediate_size", "prefix_dense_intermediate_size"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
                     "num_encoder_layers", "num_decoder_layers", "depth", "num_blocks"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads",
                     "encoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "kv_n_heads"), 2),
    **dict.fromkeys(("head_dim", "dim_head", "kv_channels", "query_pre_attn_scalar", "global_head_dim", "attention_head_dim",
                     "swa_head_dim", "v_head_dim_"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "context_length", "max_source_positions",
                     "max_target_positions", "original_max_position_embeddings"), 256),
    **dict.fromkeys(("sliding_window", "local_attention", "window_size", "attention_window_size", "attention_chunk_size"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "hidden_size_per_layer_input", "o_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "rotary_dim", "laurel_rank", "state_size",
                     "mamba_d_state", "ssm_state_size", "chunk_size", "mamba_chunk_size", "time_step_rank", "block_size"), 8),
    **dict.fromkeys(("linear_num_key_heads",), 2), **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_n_heads", "n_mamba_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups", "n_groups"), 1),
    **dict.fromkeys(("mamba_d_ssm",), 128), **dict.fromkeys(("mamba_expand", "expand", "expansion_ratio"), 2),
    "causal": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "is_decoder": True,
    "image_size": 28, "patch_size": 14, "image_token_id": 520, "image_token_index": 520, "audio_token_id": 521,
    "boi_token_index": 522, "eoi_token_index": 523, "boi_token_id": 522, "eoi_token_id": 523, "eoa_token_id": 524,
    "boa_token_id": 525, "video_token_id": 526, "use_mamba_kernels": False,
}
DROPPED = ("layer_types", "mlp_layer_types", "layers_block_type", "hybrid_override_pattern", "rope_parameters",
           "attention_types", "attention_layers", "no_rope_layers", "activation_sparsity_pattern", "id2label", "label2id",
           "full_attention_idxs", "full_attn_idxs")
# fmt: on


def families() -> list[str]:
    """Every model type with a causal language model, and the second configurations."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *(n for n in EXCEPTIONS if "#" in n)})


def tiny_family(name):
    """The tiny configuration of ``name``."""
    kind = name.partition("#")[0]
    default = CONFIG_MAPPING[kind](**DEFAULTS.get(kind, {}))
    values = _shrunk(default.to_dict())
    if "qk_rope_head_dim" in values:  # latent attention has neither grouped keys nor one head_dim
        values["num_key_value_heads"] = values.get("num_attention_heads", 4)
        values.pop("head_dim", None)
    values = _merged(values, EXCEPTIONS.get(name, EXCEPTIONS.get(kind, {})))
    return AutoConfig.for_model(kind, **values)


def _merged(values, changes):
    both = {k: _merged(values[k], v) for k, v in changes.items() if isinstance(values.get(k), dict)}
    return values | changes | both


def _shrunk(values):
    found = {}
    for key, value in values.items():
        if key in DROPPED:
            continue
        if key in RULES and not (value is None and key.startswith(("q_", "sliding", "head"))):
            found[key] = RULES[key]
        elif isinstance(value, dict) and (key.endswith("_config") or key in ("decoder", "encoder")):
            found[key] = _shrunk(value) | (
                {"model_type": value["model_type"]} if "model_type" in value else {}
            )
    return found


INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16}
INDEXER |= {"indexer_budget": 8, "indexer_compress_ratio": 2}
GEMMA3N_TEXT = {"num_hidden_layers": 4, "num_kv_shared_layers": 2}
GEMMA3N_TEXT |= {"activation_sparsity_pattern": [0.0] * 4}
GEMMA3N_TEXT |= {"layer_types": ["sliding_attention", "full_attention"] * 2}
NO_LAYER_INPUT = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
# Families whose own default configuration is refused by transformers.
DEFAULTS = {"gemma4_assistant": {"text_config": NO_LAYER_INPUT}}

# fmt: off
EXCEPTIONS: dict[str, dict] = {
    "bert#encoder": {"is_decoder": False},
    "electra#encoder": {"is_decoder": False},
    "xlm-roberta#encoder": {"is_decoder": False},
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 211, "encoder_config": {"hidden_size_global": 128}, "decoder_config": {"hidden_size_global": 128},
            "global_config": {"hidden_size": 128, "num_attention_heads": 8}},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"],
                            "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "dots3_note": {"text_config": {"num_key_value_heads": 4}, "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
                   "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64}},
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon#alibi": {"alibi": True, "multi_query": False, "num_kv_heads": 4, "new_decoder_architecture": False},
    "falcon#new": {"num_kv_heads": 2, "new_decoder_architecture": True},
    "gemma3n_text": GEMMA3N_TEXT,
    "gemma3n": {"text_config": GEMMA3N_TEXT},
    "gemma4_assistant": {"backbone_hidden_size": 64, "text_config": {"num_kv_shared_layers": 2} | NO_LAYER_INPUT},
    "gemma4_unified_assistant": {"backbone_hidden_size": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": {"linear_head_dim": 16, "linear_num_heads": 4, "layer_types": ["linear_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "llama#grouped": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "longcat_flash": {"head_dim": 8, "expert_ffn_hidden_size": 32, "zero_expert_num": 2, "moe_topk": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "nemotron_h": {"hybrid_override_pattern": "M*-M", "num_hidden_layers": 4},
    "opt#narrow": {"word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_moe_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen4_exp_text": {"layer_types": ["linear_attention", "full_attention"], "ple_layer_ids": []} | INDEXER,
    "bailing_hybrid": {"head_dim": 16, "n_group": 1, "layer_types": ["linear_attention", "full_attention"]},
    "ministral": {"head_dim": 16},
    "qwen3_5": {"text_config": {"layer_types": ["linear_attention", "full_attention"]}},
    "qwen3_5_moe": {"text_config": {"layer_types": ["linear_attention", "full_attention"]}},
    "qwen4_exp": {"text_config": {"layer_types": ["linear_attention", "full_attention"], "ple_layer_ids": []} | INDEXER},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"], "local_attn_chunk_length": 16, "lsh_attn_chunk_length": 16},
    "recurrent_gemma": {"num_hidden_layers": 3, "intermediate_size": 192},
    "xlstm": {"chunk_size": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "attention_hidden_size": 128, "attention_head_dim": 32, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
    "zamba2": {"num_hidden_layers": 4, "hybrid_layer_ids": [1, 3], "num_mem_blocks": 1, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
               "attention_hidden_size": 128, "attention_head_dim": 32},
    "zaya": {"num_experts_per_tok": 1},
}
# fmt: on
