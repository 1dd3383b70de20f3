"""Bytes of activations between the forward and the backward pass, and of the backward pass itself.

Autograd saves the tensors that gradients need. Frozen linears save none; LoRA factors trained in
float32 save the input of every target as float32 and the small ``x A^T``. In a base of another
dtype each target has a copy of that input: queries, keys and values, which read one tensor, save
three. Checkpointing saves one hidden state per layer and recomputes one layer at a time.

Counts are of ``torch`` 2.13's fused causal attention and of transformers' layers (``shapes``).
"""

from __future__ import annotations

from flexlora.planning.shapes import Linear, ModelShape, TrainingPlan

__all__ = ["backward_bytes", "kept_bytes", "layer_bytes", "logit_bytes", "sketch_rows"]

FACTOR_BYTES = 4  # LoRA factors and their activations are float32


def layer_bytes(shape: ModelShape, plan: TrainingPlan, *, aligning: bool = False) -> int:
    """Bytes of the forward pass of one decoder layer that its backward pass needs.

    ``aligning`` is the pass that sketches gradients: it needs each target's input in the base's
    dtype. The model's first norm saves nothing and its last norm is in no layer; they have equal
    sizes, so L times this is the total of the model.
    """
    targets = shape.targets(plan.target_modules)
    return (
        _norm_bytes(shape, plan)
        + _attention_bytes(shape, plan)
        + plan.tokens * shape.mlp_numbers * plan.number_bytes
        + _lora_bytes(shape, plan, targets)
        + _plain_input_bytes(shape, plan, targets, aligning)
        + _carried_copies(plan, targets)
    )


def kept_bytes(shape: ModelShape, plan: TrainingPlan) -> int:
    """Bytes that checkpointing saves per layer: its input ``[tokens, hidden]``.

    bitsandbytes' 8-bit product stores its input on the autograd node, where checkpointing cannot
    drop it: an 8-bit base saves every linear's input too.
    """
    numbers = shape.hidden_size
    if plan.quantization == "8bit":
        numbers += sum(shape.source_sizes().values())
    return plan.tokens * numbers * plan.number_bytes


def _norm_bytes(shape: ModelShape, plan: TrainingPlan) -> int:
    n, e, d = plan.tokens, plan.number_bytes, shape.hidden_size
    heads = shape.query_size + shape.key_size
    if shape.rms_norm:
        scales = 4 * n * shape.norm_inputs
        if shape.query_key_norm:
            scales += 4 * n * (shape.num_heads + shape.num_key_value_heads)
        return 4 * n * d * shape.norm_inputs + scales + 4 * n * heads * shape.query_key_norm
    moments = 2 * n * e * shape.norms
    return e * n * d * shape.norm_inputs + moments + e * n * heads * shape.query_key_norm


def _attention_bytes(shape: ModelShape, plan: TrainingPlan) -> int:
    n, e = plan.tokens, plan.number_bytes
    numbers = shape.attention_numbers(plan.max_length, batch=plan.batch, attention=plan.attention)
    tensors = e * n * numbers
    if not shape.keeps_scores(plan.attention):
        mask = e * n * plan.max_length if shape.masked(plan.max_length) else 0
        return tensors + mask + 4 * n * shape.num_heads  # the kernel's log-sum-exp
    return tensors + shape.score_bytes(e) * n * plan.max_length * shape.num_heads


def _lora_bytes(shape: ModelShape, plan: TrainingPlan, targets: tuple[Linear, ...]) -> int:
    """``x`` and ``x A^T`` of every target, in float32."""
    n = plan.tokens
    hidden = sum(min(plan.rank, x.in_features, x.out_features) for x in targets)
    if plan.lora_dropout > 0:
        inputs = 2 * sum(x.in_features for x in targets)  # dropped out, and the mask
    elif plan.number_bytes != FACTOR_BYTES:
        inputs = sum(x.in_features for x in targets)
    else:
        inputs = sum(_distinct_inputs(shape, plan, targets).values())
    return FACTOR_BYTES * n * (inputs + hidden)


def _distinct_inputs(
    shape: ModelShape, plan: TrainingPlan, targets: tuple[Linear, ...]
) -> dict[str, int]:
    """Widths of the targets' input tensors that no other operation saves, by tensor."""
    sizes = {x.source: x.in_features for x in targets}
    if not (shape.own_output or shape.keeps_scores(plan.attention)):
        sizes.pop("attention_out", None)  # the attention kernel saves its output
    return sizes


def _plain_input_bytes(
    shape: ModelShape, plan: TrainingPlan, targets: tuple[Linear, ...], aligning: bool
) -> int:
    """Inputs in the base's dtype, for the sketch and for the backward pass of 8-bit linears."""
    shared = plan.number_bytes == FACTOR_BYTES and plan.lora_dropout == 0
    if shared or not (aligning or plan.quantization == "8bit"):
        return 0
    read = shape.linears if plan.quantization == "8bit" else targets
    return plan.number_bytes * plan.tokens * sum(_distinct_inputs(shape, plan, read).values())


def _carried_copies(plan: TrainingPlan, targets: tuple[Linear, ...]) -> int:
    """The float32 copies of 16-bit carried factors, which autograd saves."""
    if plan.carried_dtype == "float32":
        return 0
    return FACTOR_BYTES * sum(
        min(plan.carried_rank, x.in_features, x.out_features) * (x.in_features + x.out_features)
        for x in targets
    )


def logit_bytes(shape: ModelShape, plan: TrainingPlan) -> int:
    """Logits and loss of the answer tokens at their peak, in the loss's backward pass.

    ``log_softmax`` and the gradients of its output and of its input, in float32; a model that caps
    its logits saves their tanh too.
    """
    each = 3 * 4 + (plan.number_bytes if shape.capped_logits else 0)
    return each * plan.answer_tokens * shape.vocab_size


def backward_bytes(shape: ModelShape, plan: TrainingPlan) -> int:
    """Peak bytes of one layer's backward pass beyond its activations.

    The peak is in the MLP. In bytes per token and unit of its width, of which the layer has saved
    ``saved``: the gradient of the last linear's input by LoRA (4) and by the carried factors, while
    that input is in memory; after it is freed (-4), the gradients of a product and of both its
    factors (3 numbers), or of a fused activation and its input (2). Or, where checkpointing
    recomputes the layer, the first linears' output, LoRA's, and their sum, before the rest of
    ``saved`` exists.
    """
    n, e, ff = plan.tokens, plan.number_bytes, shape.intermediate_size
    copied = e != FACTOR_BYTES
    saved = shape.mlp_numbers / ff * e + FACTOR_BYTES
    products = shape.gated or shape.mlp_numbers > ff
    by_lora = FACTOR_BYTES + (e if plan.carried_rank and not plan.merged else 0)
    backward = max(by_lora, (3 if products else 2) * e - FACTOR_BYTES)
    joined = shape.gated and shape.fused == "rotated"  # gate and up are one linear
    outputs = (2 * e + FACTOR_BYTES if copied else 3 * e) * (2 if joined else 1)
    before = 2 * e if shape.gated and not joined else 0
    widest = n * ff * max(backward, before + outputs - saved)
    if shape.keeps_scores(plan.attention):
        scores = shape.score_gradient_bytes(e) * n * plan.max_length * shape.num_heads
        widest = max(widest, scores - n * ff * saved)
    return round(widest) + n * shape.hidden_size * (e + FACTOR_BYTES * copied)


def sketch_rows(rank: int, out_features: int) -> int:
    """Rows of a target's gradient sketch, as ``sketch.sketch_size`` has them."""
    return min(4 * rank + 16, out_features)
