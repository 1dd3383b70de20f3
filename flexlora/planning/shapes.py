"""The sizes of a model: linears, parameters, and the tensors that autograd saves per layer.

No weights and no torch: the planner reads a few kilobytes and takes milliseconds. The saved numbers
are those of transformers' modules (5.x), read from their code and compared with autograd's saved
tensors in the tests. Per layer and token, beside the inputs of LoRA:

    norm       its input, in float32 for an RMSNorm, in the base's dtype for a LayerNorm
    attention  queries, keys, values and output of ``scaled_dot_product_attention``; queries or
               keys that are views of a fused projection save all of it
    MLP        act(gate) * up saves gate, act(gate) and up; without a gate the activation's tensors

               eager attention saves queries, repeated keys and values, and ``[heads, T, T]``
               scores after the softmax: in float32 and, if another, in the base's dtype

Gemma 2 caps its attention scores, which torch's fused kernel does not: it is eager by default.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from flexlora.errors import UserError, nearest

__all__ = ["BYTES", "Linear", "ModelShape", "TrainingPlan"]

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Linear:
    """One linear of a decoder layer; ``source`` names the tensor that it reads."""

    name: str
    out_features: int
    in_features: int
    source: str
    bias: bool = False

    @property
    def numbers(self) -> int:
        return self.out_features * self.in_features


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a decoder-only model: all that its memory depends on, L equal layers."""

    model_type: str
    dtype: str  # the checkpoint's
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    tied: bool
    sliding_window: int | None
    mlp_numbers: int  # saved by the MLP per token beside the input of its last linear
    linears: tuple[Linear, ...]
    head_bias: bool = False
    learned_positions: int = 0  # rows of a position embedding, 0 for rotary ones
    rms_norm: bool = True
    norms: int = 2  # norms of width hidden_size in a layer
    norm_inputs: int = 2  # different tensors among their inputs
    query_key_norm: bool = False
    fused: str = ""  # or "split" (views of one projection), "rotated" (views, then rotated copies)
    own_output: bool = False  # the output projection reads a copy, not the kernel's output itself
    scores: bool = False  # attention scores are capped: eager where no implementation is asked for
    gated: bool = True
    capped_logits: bool = False
    tower_numbers: int = 0  # parameters that text does not reach: in memory, without LoRA

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def key_size(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @property
    def embedding_numbers(self) -> int:
        return (self.vocab_size + self.learned_positions) * self.hidden_size

    @property
    def head_numbers(self) -> int:
        """The output layer's weight, unless tied to the embedding, and bias."""
        weight = 0 if self.tied else self.vocab_size * self.hidden_size
        return weight + (self.vocab_size if self.head_bias else 0)

    @property
    def linear_numbers(self) -> int:
        return self.num_layers * sum(linear.numbers for linear in self.linears)

    @property
    def small_numbers(self) -> int:
        """Norms and biases, the last norm among them."""
        width = 1 if self.rms_norm else 2
        norms = self.norms * self.hidden_size * width
        if self.query_key_norm:
            norms += 2 * self.head_dim * width
        biases = sum(linear.out_features for linear in self.linears if linear.bias)
        return self.num_layers * (norms + biases) + self.hidden_size * width

    @property
    def num_parameters(self) -> int:
        text = self.embedding_numbers + self.head_numbers + self.linear_numbers
        return text + self.small_numbers + self.tower_numbers

    def targets(self, target_modules: str = "all-linear") -> tuple[Linear, ...]:
        """The linears of a layer that get LoRA: all, or those whose name ends like one given.

        Raises:
            UserError: a name that no linear of a layer has.
        """
        if target_modules == "all-linear":
            return self.linears
        wanted = [name.strip() for name in target_modules.split(",")]
        leaves = {linear.name.rpartition(".")[2] for linear in self.linears}
        odd = [name for name in wanted if name not in leaves]
        if odd:
            raise UserError(
                f"target modules are '{target_modules}', expected 'all-linear' or some of "
                f"{', '.join(sorted(leaves))}.{nearest(odd[0], leaves)}"
            )
        return tuple(x for x in self.linears if x.name.rpartition(".")[2] in wanted)

    def source_sizes(self) -> dict[str, int]:
        """Width of each tensor that linears of a layer read."""
        return {linear.source: linear.in_features for linear in self.linears}

    def masked(self, length: int) -> bool:
        """Whether rows are longer than the attention window, so that attention has a mask."""
        return self.sliding_window is not None and length > self.sliding_window

    def keeps_scores(self, attention: str) -> bool:
        """Whether attention scores are saved with this ``model.attn-implementation``."""
        return attention == "eager" or (self.scores and attention == "auto")

    def score_bytes(self, number_bytes: int) -> int:
        """Bytes that eager attention saves per score in a base of ``number_bytes`` per number."""
        capped = number_bytes if self.scores else 0  # the tanh
        if self.model_type == "gpt2":  # the one softmax that is not in float32
            return number_bytes
        return 4 + (number_bytes if number_bytes != 4 else 0) + capped

    def score_gradient_bytes(self, number_bytes: int) -> int:
        """Bytes per score of the softmax's backward pass, beyond those saved.

        The gradients of its output and its input, in float32, minus the freed copy of its output in
        the base's dtype.
        """
        if self.model_type == "gpt2":
            return 2 * number_bytes
        return 2 * 4 - (number_bytes if number_bytes != 4 else 0)

    def attention_numbers(self, length: int, *, batch: int = 1, attention: str = "auto") -> int:
        """Numbers that attention saves per token and layer, in the base's dtype, without scores."""
        queries, keys = self.query_size, self.key_size
        if self.keeps_scores(attention):
            # Keys and values are repeated for every head; with one row and nothing to repeat the
            # values stay a view of the fused projection.
            view = self.fused == "rotated" and batch == 1 and keys == queries
            return 3 * queries + (2 * queries if view else 0)
        repeated = queries if self.masked(length) else keys  # with a mask heads are repeated
        if self.fused == "split":
            return queries + 2 * keys + queries
        if self.fused == "rotated":
            return (queries + 2 * keys) + queries + repeated + queries
        return queries + 2 * repeated + queries


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """How one client trains: the inputs of the memory model beside the model's shape.

    ``attention`` is ``model.attn-implementation``; ``answer_fraction`` is the share of answer
    tokens: only they reach the output layer. With ``unified_memory`` (a CPU, a Jetson, a laptop's
    GPU) the received factors of the job count too. ``runtime_bytes`` are those of the process
    before the model is loaded.
    """

    rank: int
    max_length: int
    batch: int = 1
    quantization: str = "none"
    dtype: str = "float32"
    carried_rank: int = 0
    carried_dtype: str = "float32"
    gradient_checkpointing: bool = False
    optim: str = "adamw_torch"
    attention: str = "auto"
    aligned: bool = False
    merged: bool = False
    lora_dropout: float = 0.0
    target_modules: str = "all-linear"
    answer_fraction: float = 0.5
    unified_memory: bool = False
    runtime_bytes: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of one pass, padding included."""
        return self.batch * self.max_length

    @property
    def answer_tokens(self) -> int:
        return math.ceil(self.tokens * self.answer_fraction)

    @property
    def number_bytes(self) -> int:
        """Bytes of one number in the base's dtype."""
        return BYTES[self.dtype]
