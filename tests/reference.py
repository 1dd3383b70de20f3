"""The slow, obvious version of everything that is fast in the product: dense, float64, one client.

Nothing here imports the product's arithmetic. A matrix is formed whole, a truncation is numpy's
dense SVD, and local training is torch's own AdamW on explicit factors merged into the weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from flexlora.lora.adapters import Adapter, LoRAFactors


def scaling(factors):
    """alpha / rank (LoRA) or alpha / sqrt(rank) (rsLoRA), from the shapes alone."""
    rank = factors.lora_A.shape[0]
    return factors.alpha / (math.sqrt(rank) if factors.rslora else rank)


def delta_weight(factors):
    """``scaling * B @ A`` in float64, ``[out, in]``."""
    return scaling(factors) * (factors.lora_B.double() @ factors.lora_A.double())


def flexlora_average(clients, module):
    """Equation 2 of arXiv 2402.11505: ``sum_k n_k / n * s_k B_k A_k``, dense."""
    total = sum(num_examples for _, num_examples in clients)
    shape = delta_weight(clients[0][0][module]).shape
    result = torch.zeros(shape, dtype=torch.float64)
    for adapter, num_examples in clients:
        result += num_examples / total * delta_weight(adapter[module])
    return result


def residual_form(G, clients, starts, module, server_learning_rate=1.0):
    """``G + eta * sum_k p_k (s_k B_k A_k - start_k)`` with the start of every client by itself."""
    total = sum(num_examples for _, num_examples in clients)
    result = G.double().clone()
    for (adapter, num_examples), start in zip(clients, starts, strict=True):
        change = delta_weight(adapter[module]) - delta_weight(start[module])
        result += server_learning_rate * num_examples / total * change
    return result


def fedexp_rate(changes, num_examples):
    """FedExP's server rate (arXiv 2301.09604), weighted by examples, from 1 to 2.

    ``changes``: one ``{module: dense change}`` per client.
    """
    flat = [torch.cat([change[name].flatten() for name in sorted(change)]) for change in changes]
    shares = [n / sum(num_examples) for n in num_examples]
    mean = sum(p * change for p, change in zip(shares, flat, strict=True))
    squares = sum(p * float(change @ change) for p, change in zip(shares, flat, strict=True))
    return max(1.0, min(2.0, squares / (2 * float(mean @ mean))))


def truncate(matrix, rank):
    """The best approximation of that rank, by LAPACK's dense SVD."""
    U, S, Vh = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    return torch.from_numpy((U[:, :rank] * S[:rank]) @ Vh[:rank])


def relative_error(got, expected):
    """``|got - expected|_F / |expected|_F`` in float64; absolute where zero is expected."""
    error = float((got.double() - expected.double()).norm())
    size = float(expected.double().norm())
    return error / size if size > 0 else error


def adapter_distance(got, expected):
    """The largest relative error of any module's delta_weight."""
    assert set(got) == set(expected)
    return max(
        relative_error(delta_weight(got[name]), delta_weight(expected[name])) for name in expected
    )


# --- one client's training, with torch's own parts -------------------------------------------


def factors_product(factors):
    """``scaling * B @ A`` in the factors' own dtype, so that gradients reach them."""
    return scaling(factors) * (factors.lora_B @ factors.lora_A)


def merged_weights(model, adapters):
    """``{parameter name: W + sum of s B A}`` of the plain ``model``; gradients flow to factors.

    Square Conv1D weights are told apart by the module's class, not by their shape.
    """
    merged = {}
    for name in adapters[0]:
        module = model.get_submodule(name)
        weight = module.weight.detach()
        for adapter in adapters:
            delta = factors_product(adapter[name])
            transposed = type(module).__name__ == "Conv1D"
            weight = weight + (delta.T if transposed else delta).to(weight.dtype)
        merged[f"{name}.weight"] = weight
    return merged


def logits_of(model, adapters, input_ids):
    """Logits ``[T, vocab]`` of one unpadded row under the merged weights."""
    row = torch.tensor([list(input_ids)])
    merged = merged_weights(model, adapters) if adapters else {}
    return torch.func.functional_call(model, merged, (row,), {"use_cache": False}).logits[0]


def answer_loss(logits, example):
    """Summed cross entropy of the answer tokens of one row, each predicted from those before it."""
    ids = torch.tensor(example.input_ids)
    positions = torch.arange(example.prompt_length, len(ids))
    return cross_entropy(logits[positions - 1], ids[positions], reduction="sum")


@dataclass
class Recipe:
    """The arguments of a local round."""

    learning_rates: list  # one per optimizer step
    batches: list  # indices of the examples of each step
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    adam_epsilon: float = 1e-8
    optim: str = "adamw_torch"


def train_one_client(
    model,
    start,
    examples,
    recipe,
    carried=None,
    trainable=("lora_A", "lora_B"),
    penalty=lambda adapter: 0.0,
    private=None,
):
    """A plain loop: every row by itself, unpadded; torch.optim; the mean over answer tokens.

    ``penalty(adapter)`` is added to the loss, so that autograd takes its gradient. ``private`` is
    DP-SGD's (clip, divisor, noise of every step as a list of tensors): then a row's loss is its own
    mean.
    """
    leaves, modules = [], {}
    for name, factors in start.items():
        tensors = {}
        for label in ("lora_A", "lora_B"):
            tensor = getattr(factors, label).detach().clone()
            if label in trainable:
                tensor.requires_grad_()
                leaves.append(tensor)
            tensors[label] = tensor
        modules[name] = LoRAFactors(**tensors, alpha=factors.alpha, rslora=factors.rslora)
    adapter = Adapter(modules)
    adapters = [adapter] + ([carried] if carried is not None else [])
    if recipe.optim == "sgd":
        optimizer = torch.optim.SGD(leaves, lr=1.0, weight_decay=recipe.weight_decay)
    else:
        optimizer = torch.optim.AdamW(
            leaves, lr=1.0, eps=recipe.adam_epsilon, weight_decay=recipe.weight_decay
        )
    for learning_rate, indices in zip(recipe.learning_rates, recipe.batches, strict=True):
        rows = [examples[i] for i in indices]
        tokens = sum(len(row.input_ids) - row.prompt_length for row in rows)
        loss = sum(answer_loss(logits_of(model, adapters, row.input_ids), row) for row in rows)
        optimizer.zero_grad()
        if private is None:
            (loss / tokens + penalty(adapter)).backward()
        else:
            losses = [row_loss(model, adapters, row) for row in rows]
            clip, divisor, noises = private
            sums = clipped_row_sum([torch.autograd.grad(loss, leaves) for loss in losses], clip)
            for i, (leaf, noise) in enumerate(zip(leaves, noises.pop(0), strict=True)):
                leaf.grad = ((sums[i] if sums else 0.0) + noise) / divisor
        if recipe.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(leaves, recipe.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
    return adapter.map(lambda tensor: tensor.detach())


def row_loss(model, adapters, row):
    """The mean loss over one row's answer tokens."""
    tokens = len(row.input_ids) - row.prompt_length
    return answer_loss(logits_of(model, adapters, row.input_ids), row) / tokens


def clipped_row_sum(gradients, clip):
    """``sum_i g_i min(1, clip / |g_i|)``, row by row; each ``g_i`` is a list of tensors."""
    clipped = []
    for gradient in gradients:
        norm = math.sqrt(sum(float(part.square().sum()) for part in gradient))
        clipped.append([part * min(1.0, clip / norm) for part in gradient])
    return [sum(parts) for parts in zip(*clipped, strict=True)]


def zero_padded_factors(clients, module, rank):
    """FedIT with unequal ranks: the means of padded ``lora_A`` and of padded ``s lora_B``."""
    total = sum(num_examples for _, num_examples in clients)
    mean_A, mean_B = 0.0, 0.0
    for adapter, num_examples in clients:
        factors = adapter[module]
        missing = rank - factors.rank
        share = num_examples / total
        mean_A = mean_A + share * np.pad(factors.lora_A.double().numpy(), ((0, missing), (0, 0)))
        scaled_B = factors.scaling * factors.lora_B.double().numpy()
        mean_B = mean_B + share * np.pad(scaled_B, ((0, 0), (0, missing)))
    return torch.from_numpy(mean_A), torch.from_numpy(mean_B)


# --- what a method asks of its clients beside plain steps -------------------------------------


def stacked(adapters):
    """One adapter with the sum of the products: ``[s_1 B_1 ...] @ [A_1; ...]`` at scaling 1."""
    modules = {}
    for name in adapters[0]:
        parts = [adapter[name] for adapter in adapters]
        lora_A = torch.cat([factors.lora_A for factors in parts])
        lora_B = torch.cat([scaling(factors) * factors.lora_B for factors in parts], dim=1)
        modules[name] = LoRAFactors(lora_A=lora_A, lora_B=lora_B, alpha=float(lora_A.shape[0]))
    return Adapter(modules)


def pull(start, mu):
    """FedProx's penalty as it is written down: ``mu / 2 |factors - start|^2``."""

    def penalty(adapter):
        total = 0.0
        for name, factors in adapter.items():
            total = total + (factors.lora_A - start[name].lora_A).square().sum()
            total = total + (factors.lora_B - start[name].lora_B).square().sum()
        return mu / 2 * total

    return penalty


def tail_product(adapter, kept):
    """HetLoRA's ``sum over modules |B_tail|_F |A_tail|_F``; the tail begins at ``kept * rank``."""
    total = 0.0
    for factors in adapter.values():
        first = max(1, math.floor(kept * factors.lora_A.shape[0]))
        if first < factors.lora_A.shape[0]:
            tail_A, tail_B = factors.lora_A[first:], factors.lora_B[:, first:]
            total = total + torch.linalg.norm(tail_B) * torch.linalg.norm(tail_A)
    return total


def causal_attention(query, key, value, scale):
    """``softmax(scale Q K^T + causal) V``, head by head; a group shares a key head."""
    group, tokens = query.shape[1] // key.shape[1], query.shape[2]
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    heads = []
    for head in range(query.shape[1]):
        q, k, v = query[:, head], key[:, head // group], value[:, head // group]
        scores = (scale * q @ k.transpose(1, 2)).masked_fill(~seen, float("-inf"))
        heads.append(torch.softmax(scores, dim=-1) @ v)
    return torch.stack(heads, dim=1)


def clipped_sum(changes, norms, clip):
    """``sum_k min(1, C / |D_k|) D_k`` in float64; ``norms`` are over all modules together."""
    scaled = [min(1.0, clip / norm) * D.double() for D, norm in zip(changes, norms, strict=True)]
    return sum(scaled)


def walsh_hadamard(size):
    """The orthonormal Walsh-Hadamard matrix: entry (i, j) has the sign of the parity of i & j."""
    signs = [[1 - 2 * ((i & j).bit_count() % 2) for j in range(size)] for i in range(size)]
    return torch.tensor(signs, dtype=torch.float64) / size**0.5


def polynomial_at_zero(points, prime):
    """``f(0)`` of the polynomial of lowest degree through ``points`` (x to y), modulo a prime."""
    total = 0
    for x, y in points.items():
        term = y
        for other in points:
            if other != x:
                term = term * -other * pow(x - other, prime - 2, prime) % prime
        total += term
    return total % prime


def one_run_p_value(canaries, guesses, correct, epsilon, delta):
    """Theorem 5.2 of arXiv 2305.08846 as it is written, from binomial coefficients."""
    right = 1 / (1 + math.exp(-epsilon))

    def at_least(v):
        return sum(
            math.comb(guesses, k) * right**k * (1 - right) ** (guesses - k)
            for k in range(max(v, 0), guesses + 1)
        )

    rises = [(at_least(correct - i) - at_least(correct)) / i for i in range(1, canaries + 1)]
    return min(1.0, at_least(correct) + 2 * canaries * delta * max(0.0, *rises))


def roc_area(members, others):
    """The share of pairs in which the member's score is the larger, ties counted half."""
    pairs = [(a > b) + 0.5 * (a == b) for a in members for b in others]
    return sum(pairs) / len(pairs)


# --- robust means, on flattened dense changes [n, d] ------------------------------------------


def flat_changes(adapters, starts):
    """``s_k B_k A_k - start_k`` of all modules as one float64 row per client."""
    return torch.stack(
        [
            torch.cat([(delta_weight(a[n]) - delta_weight(s[n])).flatten() for n in sorted(a)])
            for a, s in zip(adapters, starts, strict=True)
        ]
    )


def krum_mean(changes, hostile):
    """The mean of the n - f changes with the smallest sums of squares of nearest distances."""
    n, scores = len(changes), []
    for i in range(n):
        others = sorted(float((changes[i] - changes[j]).norm()) ** 2 for j in range(n) if j != i)
        scores.append(sum(others[: n - hostile - 1]))
    chosen = sorted(range(n), key=lambda i: scores[i])[: n - hostile]
    return changes[chosen].mean(dim=0)


def weiszfeld(changes, *, floor=0.0, steps=2000):
    """The geometric median; ``floor``: smallest distance, as a share of the median one."""
    centre = changes.mean(dim=0)
    for _ in range(steps):
        distances = (changes - centre).norm(dim=1)
        weights = 1.0 / distances.clamp_min(max(floor * float(distances.median()), 1e-300))
        last, centre = centre, (weights[:, None] * changes).sum(dim=0) / weights.sum()
        if float((centre - last).norm()) <= 1e-11 * float(distances.max()):
            break
    return centre


def clipped_centre(changes, steps=2000):
    """Huber's centre: pulls are cut at the median distance."""
    centre = changes.mean(dim=0)
    for _ in range(steps):
        pulls = changes - centre
        norms = pulls.norm(dim=1)
        radius = norms.median()
        step = (pulls * (radius / norms.clamp_min(radius))[:, None]).mean(dim=0)
        centre = centre + step
        if float(step.norm()) <= 1e-11 * float(norms.max()):
            break
    return centre


def axes_of(changes):
    """The medoid, and the principal axes ``[d, k]`` of the others less it, cut to median length."""
    distances = torch.stack([(changes - row).norm(dim=1) for row in changes])
    origin = changes[int(distances.sum(dim=1).argmin())]
    deviations = changes - origin
    norms = deviations.norm(dim=1)
    scale = (norms[norms > 0].median() / norms.clamp_min(1e-300)).clamp_max(1.0)
    _, S, Vh = np.linalg.svd((scale[:, None] * deviations).numpy(), full_matrices=False)
    return origin, torch.from_numpy(Vh[max(1e-6 * S[0], 1e-300) < S].T.copy())


def trimmed(changes, hostile):
    """Each coordinate in those axes without its f smallest and f largest values."""
    origin, axes = axes_of(changes)
    coordinates = ((changes - origin) @ axes).sort(dim=0).values
    return origin + axes @ coordinates[hostile : len(changes) - hostile].mean(dim=0)


def nearest_mixed(changes, hostile):
    """Each change replaced by the mean of the n - f nearest ones, itself among them."""
    n, rows = len(changes), []
    for i in range(n):
        distances = (changes - changes[i]).norm(dim=1).tolist()
        distances[i] = -1.0
        order = sorted(range(n), key=distances.__getitem__)
        rows.append(changes[order[: n - hostile]].mean(dim=0))
    return torch.stack(rows)


ROBUST = {
    "multi-krum": krum_mean,
    "geometric-median": lambda changes, hostile: weiszfeld(changes, floor=1e-3),
    "centred-clipping": lambda changes, hostile: clipped_centre(changes),
    "nearest-trimmed-mean": lambda changes, hostile: trimmed(
        nearest_mixed(changes, hostile), hostile
    ),
    "nearest-median": lambda changes, hostile: weiszfeld(
        nearest_mixed(changes, hostile), floor=1e-3
    ),
}
