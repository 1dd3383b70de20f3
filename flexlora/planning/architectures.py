"""From a model's ``config.json`` to its shape, family by family, with transformers' own defaults.

A missing key of a config.json has the default of the family's configuration class; the tests
compare every family's parameter count and linears with the real model on torch's meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flexlora.errors import UserError, nearest
from flexlora.planning.shapes import Linear, ModelShape

__all__ = ["FAMILIES", "shape_from_config"]

# Tensors of the MLP's width that an activation saves for its backward pass: a fused kernel its
# input, one composed of products (GPT-2's tanh) every factor.
ACTIVATION_TENSORS = {
    "silu": 1,
    "swish": 1,
    "gelu": 1,
    "gelu_pytorch_tanh": 1,
    "relu": 1,
    "quick_gelu": 2,
    "gelu_new": 4,
}


def shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    """The shape of a ``config.json``, or of the ``text_config`` in one.

    Raises:
        UserError: an unknown architecture, a mixture of experts, or a missing key.
    """
    model_type = str(config.get("model_type", ""))
    _refuse(config, model_type)
    return FAMILIES[model_type](_Reader(config, model_type))


def _refuse(config: Mapping[str, Any], model_type: str) -> None:
    experts = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    if "moe" in model_type or any((config.get(key) or 0) > 1 for key in experts):
        raise UserError(
            f"'{model_type}' is a mixture of experts: {_expert_coverage(config)}. Its memory "
            f"cannot be planned, expected a dense model of {', '.join(FAMILIES)}; 'flexlora "
            "simulate' trains it with ranks given by hand (ranks.policy=fixed)."
        )
    if model_type not in FAMILIES:
        raise UserError(
            f"config.json has model_type '{model_type}', expected one of "
            f"{', '.join(FAMILIES)}.{nearest(model_type, FAMILIES)}"
        )


# Mixtures whose layers all have attention of the usual kind, and experts of three matrices.
_PLAIN_MIXTURES = ("mixtral", "olmoe", "qwen3_moe", "gpt_oss", "phimoe", "minimax_m2", "flex_olmo")


def _expert_coverage(config: Mapping[str, Any]) -> str:
    """The share of the weights that LoRA covers, where config.json gives it."""
    reader = _Reader(config, str(config["model_type"]))
    cause = "experts are fused parameters, which this version does not adapt"
    if reader.model_type not in _PLAIN_MIXTURES or config.get("mlp_only_layers"):
        return f"{cause}; config.json does not tell what share of the weights lora covers"
    try:
        sizes = reader.sizes()
        experts = reader.size("num_local_experts", "num_experts")
        inner = reader.size("moe_intermediate_size", default=sizes.inner)
    except UserError:
        return f"{cause}; config.json does not tell what share of the weights lora covers"
    attention = 2 * sizes.hidden * sizes.head * (sizes.heads + sizes.key_heads)
    total = attention + experts * sizes.hidden * (3 * inner + 1)  # a router's row per expert
    return f"lora covers {100 * attention / total:.0f} % of the weights: {cause}"


class _Sizes(NamedTuple):
    hidden: int
    heads: int
    key_heads: int
    head: int
    inner: int


class _Reader:
    """Keys of one config.json, with the defaults of transformers."""

    def __init__(self, config: Mapping[str, Any], model_type: str) -> None:
        self.config, self.model_type = config, model_type

    def size(self, *names: str, default: int | None = None) -> int:
        value = next((self.config[n] for n in names if self.config.get(n) is not None), default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(
                f"config.json ({self.model_type}) has {names[0]} {value!r}, "
                "expected a whole number of at least 1."
            )
        return value

    def flag(self, name: str, default: bool) -> bool:
        return bool(self.config.get(name, default))

    def sizes(self, head_dim: int | None = None) -> _Sizes:
        """Widths and heads; ``head_dim`` is a family's default where it is not hidden / heads."""
        d, heads = self.size("hidden_size", "n_embd"), self.size("num_attention_heads", "n_head")
        inner = 4 * d if self.model_type == "gpt2" else None  # the one family with a default
        return _Sizes(
            hidden=d,
            heads=heads,
            key_heads=self.size("num_key_value_heads", default=heads),
            head=self.size("head_dim", default=head_dim or d // heads),
            inner=self.size("intermediate_size", "n_inner", default=inner),
        )

    def activation_tensors(self, *names: str, default: str) -> int:
        name = next((self.config[n] for n in names if self.config.get(n)), default)
        if str(name) not in ACTIVATION_TENSORS:
            raise UserError(
                f"config.json ({self.model_type}) has the activation '{name}', expected one of "
                f"{', '.join(ACTIVATION_TENSORS)}.{nearest(str(name), ACTIVATION_TENSORS)}"
            )
        return ACTIVATION_TENSORS[str(name)]


def _gated_family(
    *,
    head_dim: int | None = None,
    tied: bool = False,
    norms: int = 2,
    activation: tuple[str, ...] = ("hidden_act",),
    activation_default: str = "silu",
    qkv_bias: bool = False,
    query_key_norm: bool = False,
    scores: bool = False,
    capped: bool = False,
) -> Callable[[_Reader], ModelShape]:
    """Llama and those built like it: RMSNorm, rotary positions, a gated MLP, grouped queries."""

    def read(reader: _Reader) -> ModelShape:
        sizes = reader.sizes(head_dim)
        d, heads, key_heads, size, ff = sizes
        bias, mlp_bias = reader.flag("attention_bias", False), reader.flag("mlp_bias", False)
        linears = (
            Linear("self_attn.q_proj", heads * size, d, "attention_in", bias or qkv_bias),
            Linear("self_attn.k_proj", key_heads * size, d, "attention_in", bias or qkv_bias),
            Linear("self_attn.v_proj", key_heads * size, d, "attention_in", bias or qkv_bias),
            Linear("self_attn.o_proj", d, heads * size, "attention_out", bias),
            Linear("mlp.gate_proj", ff, d, "mlp_in", mlp_bias),
            Linear("mlp.up_proj", ff, d, "mlp_in", mlp_bias),
            Linear("mlp.down_proj", d, ff, "mlp_mid", mlp_bias),
        )
        saved = reader.activation_tensors(*activation, default=activation_default)
        return _shape(
            reader,
            sizes,
            tied=reader.flag("tie_word_embeddings", tied),
            norms=norms,
            norm_inputs=norms,
            query_key_norm=query_key_norm,
            scores=scores,
            mlp_numbers=(saved + 2) * ff,
            capped_logits=capped and bool(reader.config.get("final_logit_softcapping")),
            linears=linears,
        )

    return read


def _phi3(reader: _Reader) -> ModelShape:
    """Phi-3 and Phi-4: Llama with fused projections."""
    sizes = reader.sizes()
    d, heads, key_heads, size, ff = sizes
    linears = (
        Linear("self_attn.o_proj", d, heads * size, "attention_out"),
        Linear("self_attn.qkv_proj", (heads + 2 * key_heads) * size, d, "attention_in"),
        Linear("mlp.gate_up_proj", 2 * ff, d, "mlp_in"),
        Linear("mlp.down_proj", d, ff, "mlp_mid"),
    )
    return _shape(
        reader,
        sizes,
        tied=reader.flag("tie_word_embeddings", False),
        fused="rotated",
        own_output=True,
        mlp_numbers=(reader.activation_tensors("hidden_act", default="silu") + 2) * ff,
        linears=linears,
    )


def _gpt2(reader: _Reader) -> ModelShape:
    sizes = reader.sizes()
    d, ff = sizes.hidden, sizes.inner
    saved = reader.activation_tensors("activation_function", default="gelu_new")
    return _shape(
        reader,
        sizes,
        tied=reader.flag("tie_word_embeddings", True),
        learned_positions=reader.size("n_positions", "max_position_embeddings"),
        rms_norm=False,
        fused="split",
        mlp_numbers=saved * ff,
        gated=False,
        linears=(
            Linear("attn.c_attn", 3 * d, d, "attention_in", True),
            Linear("attn.c_proj", d, d, "attention_out", True),
            Linear("mlp.c_fc", ff, d, "mlp_in", True),
            Linear("mlp.c_proj", d, ff, "mlp_mid", True),
        ),
    )


def _gpt_neox(reader: _Reader) -> ModelShape:
    sizes, bias = reader.sizes(), reader.flag("attention_bias", True)
    d, ff = sizes.hidden, sizes.inner
    return _shape(
        reader,
        sizes,
        tied=reader.flag("tie_word_embeddings", False),
        rms_norm=False,
        norm_inputs=1 if reader.flag("use_parallel_residual", True) else 2,
        fused="rotated",
        own_output=True,
        mlp_numbers=reader.activation_tensors("hidden_act", default="gelu") * ff,
        gated=False,
        linears=(
            Linear("attention.query_key_value", 3 * d, d, "attention_in", bias),
            Linear("attention.dense", d, d, "attention_out", bias),
            Linear("mlp.dense_h_to_4h", ff, d, "mlp_in", True),
            Linear("mlp.dense_4h_to_h", d, ff, "mlp_mid", True),
        ),
    )


def _phi(reader: _Reader) -> ModelShape:
    """Phi-1 and Phi-2: attention and MLP read the same norm's output."""
    sizes = reader.sizes()
    d, heads, key_heads, size, ff = sizes
    return _shape(
        reader,
        sizes,
        tied=reader.flag("tie_word_embeddings", False),
        head_bias=True,
        rms_norm=False,
        norms=1,
        norm_inputs=1,
        query_key_norm=reader.flag("qk_layernorm", False),
        own_output=True,
        mlp_numbers=reader.activation_tensors("hidden_act", default="gelu_new") * ff,
        gated=False,
        linears=(
            Linear("self_attn.q_proj", heads * size, d, "attention_in", True),
            Linear("self_attn.k_proj", key_heads * size, d, "attention_in", True),
            Linear("self_attn.v_proj", key_heads * size, d, "attention_in", True),
            Linear("self_attn.dense", d, heads * size, "attention_out", True),
            Linear("mlp.fc1", ff, d, "attention_in", True),
            Linear("mlp.fc2", d, ff, "mlp_mid", True),
        ),
    )


def _shape(reader: _Reader, sizes: _Sizes, **values: Any) -> ModelShape:
    """The fields that all families share; ``values`` are the others."""
    windowed = reader.config.get("use_sliding_window", True)  # Qwen names a window it does not use
    return ModelShape(
        model_type=reader.model_type,
        dtype=str(reader.config.get("dtype") or reader.config.get("torch_dtype") or "float32"),
        vocab_size=reader.size("vocab_size"),
        hidden_size=sizes.hidden,
        num_layers=reader.size("num_hidden_layers", "n_layer"),
        num_heads=sizes.heads,
        num_key_value_heads=sizes.key_heads,
        head_dim=sizes.head,
        intermediate_size=sizes.inner,
        max_positions=reader.size("max_position_embeddings", "n_positions", default=2048),
        sliding_window=reader.config.get("sliding_window") if windowed else None,
        **values,
    )


_GEMMA_ACTIVATION: dict[str, Any] = {
    "activation": ("hidden_activation", "hidden_act"),
    "activation_default": "gelu_pytorch_tanh",
    "tied": True,
    "head_dim": 256,
}

FAMILIES: dict[str, Callable[[_Reader], ModelShape]] = {
    "llama": _gated_family(),
    "mistral": _gated_family(),
    "qwen2": _gated_family(qkv_bias=True),
    "qwen3": _gated_family(head_dim=128, query_key_norm=True),
    "gemma": _gated_family(**_GEMMA_ACTIVATION),
    "gemma2": _gated_family(**_GEMMA_ACTIVATION, norms=4, scores=True, capped=True),
    "gemma3_text": _gated_family(**_GEMMA_ACTIVATION, norms=4, query_key_norm=True, capped=True),
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "phi": _phi,
    "phi3": _phi3,
}
