"""What a better gradient sketch would be worth, and what the present one costs in memory.

Rows are found from one batch and meant for all of a client's examples. So larger sketches and power
iterations are measured on the gradient of their own batch and on that of the client's batches that
nobody looked at, beside the other use of the same backward passes: a sketch of more batches.

``sketch.py`` beside this file prints both tables.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from statistics import mean

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from flexlora.algebra.linalg import live_rows
from flexlora.algebra.sketch import GradientSketch
from flexlora.seeds import generator
from flexlora.training.layers import LoRALinear, SlotFactors

__all__ = ["best_rows", "captured", "choice_rows", "memory_rows", "row_choices"]

BATCHES = 3  # a power iteration costs two passes more than the sketch: as many as three batches
FLAT = 1.5  # times the bytes at the smallest ``out``
SAMPLED = "one batch, exact"

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler tells of its own starts and stops


def captured(gradient: Tensor, rows: Tensor) -> float:
    """Energy ``|G Q|^2`` of ``gradient [out, in]`` in the span of ``rows [r, in]``."""
    Q = torch.linalg.qr(rows.double().T).Q
    return float((gradient @ Q).square().sum())


def best_rows(matrix: Tensor, rank: int) -> Tensor:
    """The top right singular vectors ``[rank, in]`` by a dense SVD."""
    return torch.linalg.svd(matrix, full_matrices=False).Vh[:rank]


def row_choices(batches: Sequence[Tensor], rank: int, name: str) -> dict[str, tuple[int, Tensor]]:
    """Ways to find ``rank`` rows: ``{way: (backward passes, rows [rank, in])}``.

    ``batches`` are the exact gradients of a client's first batches; all ways but the last look at
    the first alone. A power iteration is ``G Q`` and its product with ``G``: two passes.
    """
    G, out_features = batches[0], batches[0].shape[0]
    # For rank 2r + 4 the sketch has 8r + 32 rows, and smaller ones are its first rows.
    large = GradientSketch(name=name, ranks=[2 * rank + 4], out_features=out_features, seed=rank)
    Psi, middle = large.Psi, 4 * rank + 16
    uniform = torch.rand(Psi.shape, generator=generator(rank, name), dtype=torch.float64)
    signs = torch.where(uniform < 0.5, -1.0, 1.0).double()
    Q = torch.linalg.qr((Psi[:middle] @ G).T).Q
    left, within = torch.linalg.qr(G @ Q)
    ways = {
        SAMPLED: (1, G),
        "2r + 8": (1, Psi[: 2 * rank + 8] @ G),
        "4r + 16": (1, Psi[:middle] @ G),
        "4r + 16, independent signs": (1, signs[:middle] @ G),
        "8r + 32": (1, Psi @ G),
        "4r + 16, best within it": (2, within @ Q.T),
        "4r + 16, power iteration": (3, left.T @ G),
        f"4r + 16, {len(batches)} batches": (len(batches), Psi[:middle] @ sum(batches)),
    }
    return {way: (passes, best_rows(matrix, rank)) for way, (passes, matrix) in ways.items()}


def choice_rows(
    clients: Sequence[Sequence[dict[str, Tensor]]], ranks: Sequence[int], label: str
) -> list[dict[str, object]]:
    """Means over modules and clients; ``clients[k][b]`` are the gradients of k's batch b, by name.

    ``ratio`` is of the gradient of the batches after the first ``BATCHES``, its ``target`` what the
    exact top rows of one batch reach there: what lies above is bought by more data. ``own`` is of
    the one batch that was looked at.
    """
    found: dict[tuple[int, str], list[tuple[float, float, int]]] = {}
    for k, by_batch in enumerate(clients):
        for name in by_batch[0]:
            parts = [gradients[name] for gradients in by_batch]
            unseen = torch.stack(parts[BATCHES:]).sum(dim=0)
            for rank in ranks:
                best_unseen = captured(unseen, best_rows(unseen, rank))
                best_own = captured(parts[0], best_rows(parts[0], rank))
                ways = row_choices(parts[:BATCHES], rank, f"{k}.{name}")
                for way, (passes, rows) in ways.items():
                    ratios = (
                        captured(unseen, rows) / best_unseen,
                        captured(parts[0], rows) / best_own,
                    )
                    found.setdefault((rank, way), []).append((*ratios, passes))
    return [
        {
            "name": f"{label}, rank {rank}, {way}",
            "ratio": mean(ratio for ratio, *_ in values),
            "target": mean(ratio for ratio, *_ in found[rank, SAMPLED]),
            "error": 0.0,  # everything here is made from the exact gradient
            "own": mean(own for _, own, _ in values),
            "worst_own": min(own for _, own, _ in values),
            "passes": values[0][2],
        }
        for (rank, way), values in found.items()
    ]


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes that a call has allocated at one time, by torch's own profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held, most = 0, 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


def memory_rows(in_features: int = 512, tokens: int = 256, rank: int = 16) -> list[dict]:
    """Bytes as ``out`` grows: held, at the peak inside one ``add``, beside the dense gradient.

    ``ratio`` is the larger growth of the two since the first row.
    """
    rows: list[dict] = []
    for times in (1, 4, 16):
        rows.append(_memory_row(in_features * times, in_features, tokens, rank))
        growth = [rows[-1][key] / rows[0][key] for key in ("held_bytes", "add_bytes")]
        rows[-1] |= {"ratio": max(growth), "target": FLAT}
    return rows


def _memory_row(out_features: int, in_features: int, tokens: int, rank: int) -> dict:
    layer, factors = _one_layer(in_features, out_features, rank)
    x, gradient = torch.randn(1, tokens, in_features), torch.randn(1, tokens, out_features)
    sketch = GradientSketch(name="w", ranks=[rank], out_features=out_features, seed=0)
    backward = []
    for layer.observer in (None, sketch):
        gradients = partial(torch.autograd.grad, layer(x), factors, gradient)
        backward.append(peak_bytes(gradients))
    add = peak_bytes(lambda: sketch.add(x, gradient, 1))
    tensors = [value for value in vars(sketch).values() if isinstance(value, Tensor)]
    assert sketch.total is not None
    dense = gradient[0].T @ x[0]
    expected = sketch.Psi @ (2.0 * dense.double())  # one backward pass and one more ``add``
    return {
        "name": f"memory, {out_features} x {in_features}, rank {rank}",
        "error": float((sketch.total[0] - expected).norm() / expected.norm()),
        "sketch_bytes": sketch.total.numel() * sketch.total.element_size(),
        "held_bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "add_bytes": add,
        "backward_bytes": backward[0],
        "backward_with_sketch_bytes": backward[1],
        "dense_bytes": dense.numel() * dense.element_size(),
    }


def _one_layer(in_features: int, out_features: int, rank: int) -> tuple[LoRALinear, list[Tensor]]:
    """A LoRA layer of one slot over a frozen linear, and its trained factors."""
    base = nn.Linear(in_features, out_features, bias=False).requires_grad_(False)
    layer = LoRALinear(base, name="w", in_features=in_features, out_features=out_features)
    A = live_rows(rank, in_features, generator(0, "memory")).float()[None].requires_grad_()
    B = torch.zeros(1, out_features, rank, requires_grad=True)
    layer.num_slots, layer.trained = 1, SlotFactors(A=A, B=B, scaling=torch.ones(1, 1, 1))
    return layer, [A, B]
