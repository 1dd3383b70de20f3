"""One orthonormal ``lora_A`` a round for all clients, so that the sum of products is linear.

    client k:  T_c(G) frozen, first r_k rows of A [R, in] frozen, lora_B = 0; train and send lora_B
    server:    G <- T_max(G + eta * (sum_k p_k pad(s_k B_k)) A),    A A^T = I, drawn in every round

``sum_k p_k s_k B_k A[:r_k] = (sum_k p_k pad(s_k B_k)) A`` exactly, at any ranks, and
``|s_k B_k A[:r_k]|_F = |s_k B_k|_F``: what a secure sum has to add and differential privacy has to
clip is one matrix ``[out, R]`` a module (``engine/linear_update.py``). The upload is that of
FFA-LoRA (arXiv 2403.12313), whose A is the same in all rounds, so that ``G`` never leaves the row
space of the first one. Carrying ``G`` frozen beside the factors is that of ``carried``.
"""

from __future__ import annotations

import math
from typing import Literal

from flexlora.aggregation.engine.method import Law
from flexlora.aggregation.engine.options import CARRIED_RANK, AdaptiveStepOptions, option
from flexlora.aggregation.engine.server_step import moved_by
from flexlora.aggregation.engine.starts import Factoring, Start, directions
from flexlora.aggregation.engine.state import State
from flexlora.aggregation.engine.sums import Needs, Sums
from flexlora.algebra.linalg import orthonormal_rows
from flexlora.lora.adapters import Adapter, LoRAFactors
from flexlora.lora.ranks import RankClass
from flexlora.seeds import derive_seed, generator

__all__ = ["Basis"]

SCALING_RANK = 8  # the rank at which the scaling is ``alpha / rank``


class Basis:
    """All clients carry ``T_c(G)`` and train ``lora_B`` over the first rows of one random A."""

    name = "basis"
    laws = frozenset({Law.ORDER, Law.SCALE_OF_WEIGHTS, Law.ZERO_TRAINING, Law.AVERAGE_OF_PRODUCTS})
    needs = Needs(linear=True, norms=True)
    # What int8 dropped of one round's columns belongs to rows that the next round does not send.
    wire_space = ""

    class Options(AdaptiveStepOptions):
        carried_rank: int = option(
            CARRIED_RANK, "rank of the frozen factors, where a class names no other", ge=1
        )
        carried_dtype: Literal["", "float32", "bfloat16"] = option(
            "", "dtype of the frozen factors (empty: wire.dtype)"
        )

    def __init__(self, options: Options) -> None:
        self.options = options

    def start(self, state: State, rank_class: RankClass, factoring: Factoring) -> Start:
        last = rank_class.carried_rank or self.options.carried_rank
        return Start(
            rank_class=rank_class,
            base_round=state.round,
            trained=_first_rows(state, rank_class, factoring),
            carried=directions(state, dict.fromkeys(state.change, 0), last, factoring),
            carried_dtype=self.options.carried_dtype,
            trainable=("lora_B",),
        )

    def close(self, state: State, sums: Sums) -> State:
        return moved_by(state, sums.linear, self.options, norms=sums.norms)


def _first_rows(state: State, rank_class: RankClass, factoring: Factoring) -> Adapter:
    """The first rows of the round's ``A`` by rank, zeros in ``lora_B``.

    The scaling is ``alpha / sqrt(8 rank)`` whatever ``lora.rslora`` says. A step of Adam moves each
    of the ``out * rank`` entries of ``lora_B`` by the learning rate, so over orthonormal rows it
    moves the product by ``scaling * sqrt(out * rank)`` times that: the same at all ranks.
    """
    seed, modules = derive_seed(factoring.seed, "basis", state.round), {}
    for name, rank in rank_class.ranks(state.change.shapes).items():
        svd = state.change[name]
        out_features, in_features = svd.shape
        rows = orthonormal_rows(rank, in_features, generator(seed, name))
        modules[name] = LoRAFactors(
            lora_A=rows.to(svd.Vh),
            lora_B=svd.U.new_zeros(out_features, rank),
            alpha=factoring.alpha / math.sqrt(SCALING_RANK),
            rslora=True,
        )
    return Adapter(modules)
