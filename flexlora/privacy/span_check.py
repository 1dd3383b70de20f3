"""DAGER's span check: which tokens does an update show to have been in its client's rows?

The gradient ``dL/dW = sum_t g_t x_t'`` of a linear layer ``y = x W'`` has its row space in the span
of the layer's inputs. In the first layer of a model with rotary positions an input is a function of
one token, so whoever has the row space tests every token of the vocabulary (Petrov et al. 2024,
arXiv 2405.15586). LoRA factors show it in two places:

    input space    rows of ``lora_A`` that come from the gradient, or the change of ``lora_A``
    factor space   rows of ``dB ~ sum_t g_t (A x_t)'``: the span of ``A x_t``, if below the rank

A token is recovered if its input lies in the span up to ``TOLERANCE``. The span says nothing if it
is the whole space, which happens once there are as many different tokens as dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flexlora.lora.adapters import Adapter

__all__ = ["TOLERANCE", "factor_space_distances", "input_space_distances"]

TOLERANCE = 0.05  # of the norm of a token's input
RESOLVED = 1e-4  # singular values below it, relative to the largest, are rounding
MOVED = 1e-6  # relative change of a row of lora_A, above its rounding


def input_space_distances(
    start: Adapter, upload: Adapter, inputs: Mapping[str, Tensor], *, replaced: bool
) -> tuple[Tensor, int]:
    """The relative distance ``[V]`` of each token's input from the span that ``lora_A`` shows.

    ``inputs`` has ``[V, in]`` by module, all of one and the same input, whose spans are put
    together. ``replaced`` says that the client chose new rows: then they are read, not their
    change. Rows as they were sent show nothing. Returns the dimension of the span too.
    """
    rows = []
    for name in inputs:
        sent, got = start[name].lora_A.double(), upload[name].lora_A.double()
        moved = (got - sent).norm(dim=1) > MOVED * sent.norm(dim=1)
        rows.append((got if replaced else got - sent)[moved])
    tokens = next(iter(inputs.values())).double()
    outside, dimension = _outside(torch.cat(rows), tokens)
    return outside.norm(dim=1) / tokens.norm(dim=1), dimension


def factor_space_distances(
    start: Adapter, upload: Adapter, inputs: Mapping[str, Tensor]
) -> tuple[Tensor, int]:
    """The same from ``lora_B``: the distance of ``A x`` from the row space of its change.

    Over all modules together; the dimension is the smallest of any.
    """
    outside, whole, dimensions = [], [], []
    for name, tokens in inputs.items():
        change = (upload[name].lora_B - start[name].lora_B).double()
        seen = tokens.double() @ upload[name].lora_A.double().mT  # [V, rank]
        rest, dimension = _outside(change, seen)
        outside.append(rest)
        whole.append(seen)
        dimensions.append(dimension)
    distances = torch.cat(outside, dim=1).norm(dim=1) / torch.cat(whole, dim=1).norm(dim=1)
    return distances, min(dimensions)


def _outside(rows: Tensor, points: Tensor) -> tuple[Tensor, int]:
    """What of ``points [V, n]`` is outside the row space of ``rows``, and the space's dimension."""
    if not len(rows):
        return points, 0
    _, S, Vh = torch.linalg.svd(rows, full_matrices=False)
    basis = Vh[RESOLVED * S[0] < S]
    return points - points @ basis.mT @ basis, len(basis)
