"""One round of every aggregation method, dense, in float64, one module at a time.

Written from the equation that each method's file gives and from its paper, with explicit loops over
clients and over terms; nothing here imports the product's arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from flexlora.lora.adapters import Adapter
from reference import delta_weight, fedexp_rate, flexlora_average, residual_form, scaling, truncate


@dataclass
class Reply:
    """One client of a round: what it sent, what it started from and carried, which terms it had."""

    adapter: Adapter
    num_examples: int
    start: Adapter
    carried: Adapter | None = None
    terms: dict | None = None  # {module: indices}; None: the first ones


def shares(replies):
    """``p_k``: the client's part of the examples."""
    total = sum(reply.num_examples for reply in replies)
    return [reply.num_examples / total for reply in replies]


def padded(factors, rank, terms=None):
    """``A [rank, in]`` and ``s B [out, rank]`` with zeros wherever the client has no term."""
    A = np.zeros((rank, factors.in_features))
    B = np.zeros((factors.out_features, rank))
    for own, whole in enumerate(terms if terms is not None else range(factors.rank)):
        A[whole] = factors.lora_A[own].double().numpy()
        B[:, whole] = scaling(factors) * factors.lora_B[:, own].double().numpy()
    return A, B


def flexlora_round(G, replies, module, eta=1.0):
    """Eq. 2 of arXiv 2402.11505, ``sum_k p_k s_k B_k A_k``; a server step goes part of the way."""
    clients = [(reply.adapter, reply.num_examples) for reply in replies]
    return G + eta * (flexlora_average(clients, module) - G)


def flexlora_with_feedback(G, replies, module, eta=1.0):
    """What truncation took from each client, ``G - T_{r_k}(G)``, is added to its product."""
    whole = torch.zeros_like(G)
    for share, reply in zip(shares(replies), replies, strict=True):
        start = reply.start[module]
        taken = G - truncate(G, start.rank)
        whole += share * (delta_weight(reply.adapter[module]) + taken)
    return G + eta * (whole - G)


def residual_round(G, replies, module, eta=1.0):
    """``residual_form`` with the replies' own starts."""
    clients = [(reply.adapter, reply.num_examples) for reply in replies]
    return residual_form(G, clients, [reply.start for reply in replies], module, eta)


def rate_of_round(replies):
    """``fedexp_rate`` of the replies' changes against their own starts."""
    changes = [
        {
            name: delta_weight(factors) - delta_weight(reply.start[name])
            for name, factors in reply.adapter.items()
        }
        for reply in replies
    ]
    return fedexp_rate(changes, [reply.num_examples for reply in replies])


def stacked(replies, module):
    """FLoRA, arXiv 2409.05976: the product of ``[p_1 s_1 B_1 ...]`` and ``[A_1; ...]``."""
    A, B = [], []
    for share, reply in zip(shares(replies), replies, strict=True):
        factors = reply.adapter[module]
        A.append(factors.lora_A.double().numpy())
        B.append(share * scaling(factors) * factors.lora_B.double().numpy())
    return torch.from_numpy(np.hstack(B) @ np.vstack(A))


def flora_round(G, replies, module, eta=1.0):
    """``W <- W + B A`` of the two stacks."""
    return G + eta * stacked(replies, module)


def basis_round(G, replies, module, eta=1.0):
    """``G + eta (sum_k p_k pad(s_k B_k)) A``: B alone is averaged, A is the widest client's."""
    widest = max((reply.start[module] for reply in replies), key=lambda f: f.lora_A.shape[0])
    rank = widest.lora_A.shape[0]
    mean = np.zeros((widest.out_features, rank))
    for share, reply in zip(shares(replies), replies, strict=True):
        mean += share * padded(reply.adapter[module], rank)[1]
    return G + eta * torch.from_numpy(mean @ widest.lora_A.double().numpy())


def florist_cut(matrix, threshold):
    """arXiv 2506.09199: the least p with ``sum_{i <= p} S_i^2 >= tau |M|^2``; kept and dropped."""
    energy = float(matrix.square().sum())
    rank = 0
    while float(truncate(matrix, rank).square().sum()) < threshold * energy:
        rank += 1
    kept = truncate(matrix, rank)
    return kept, matrix - kept, rank


def mean_of_models(replies, module):
    """FedEx-LoRA, arXiv 2410.09432: the exact mean of the clients' models, carried and trained."""
    total = 0.0
    for share, reply in zip(shares(replies), replies, strict=True):
        carried = delta_weight(reply.carried[module]) if reply.carried is not None else 0.0
        total = total + share * (carried + delta_weight(reply.adapter[module]))
    return total


def fedit_round(replies, module, rank):
    """arXiv 2305.05644 with zeros where ranks differ: the means of ``A`` and of ``s B``."""
    A, B = 0.0, 0.0
    for share, reply in zip(shares(replies), replies, strict=True):
        own_A, own_B = padded(reply.adapter[module], rank)
        A, B = A + share * own_A, B + share * own_B
    return A, B


def alternating_round(held, replies, module, rank, trained):
    """FFA-LoRA (2403.12313), RoLoRA (2502.01755): the mean change of one factor, the other shared.

    ``held`` is ``(A, s B)`` before the round, ``trained`` one of "lora_A" and "lora_B".
    """
    A, B = (part.copy() for part in held)
    for share, reply in zip(shares(replies), replies, strict=True):
        own, start = padded(reply.adapter[module], rank), padded(reply.start[module], rank)
        if trained == "lora_A":
            A += share * (own[0] - start[0])
        else:
            B += share * (own[1] - start[1])
    return A, B


def contributors_round(held, replies, module, rank):
    """RBLA (2408.08699), Fed-PLoRA (2602.16936): each term's mean over the clients that had it."""
    A, B = (part.copy() for part in held)
    for term in range(rank):
        holders = []
        for reply in replies:
            own = reply.terms[module] if reply.terms else range(reply.adapter[module].rank)
            if term in own:
                whole_A, whole_B = padded(reply.adapter[module], rank, own)
                holders.append((reply.num_examples, whole_A[term], whole_B[:, term]))
        examples = sum(n for n, _, _ in holders)
        if examples:
            A[term] = sum(n * row for n, row, _ in holders) / examples
            B[:, term] = sum(n * column for n, _, column in holders) / examples
    return A, B


def hetlora_round(replies, module, rank):
    """arXiv 2401.06432: FedIT's sum in weights proportional to the norm of the whole update."""
    norms = [
        math.sqrt(sum(float(delta_weight(f).square().sum()) for f in reply.adapter.values()))
        for reply in replies
    ]
    A, B = 0.0, 0.0
    for norm, reply in zip(norms, replies, strict=True):
        own_A, own_B = padded(reply.adapter[module], rank)
        A, B = A + norm / sum(norms) * own_A, B + norm / sum(norms) * own_B
    return A, B


def raflora_sum(replies, module, of=lambda reply: reply.adapter):
    """arXiv 2602.13486: term j of a client counts by its part of those whose rank is above j."""
    first = of(replies[0])[module]
    total = np.zeros((first.out_features, first.in_features))
    for j in range(max(of(reply)[module].rank for reply in replies)):
        holders = [reply for reply in replies if of(reply)[module].rank > j]
        examples = sum(reply.num_examples for reply in holders)
        for reply in holders:
            f = of(reply)[module]
            term = np.outer(f.lora_B[:, j].double().numpy(), f.lora_A[j].double().numpy())
            total += reply.num_examples / examples * scaling(f) * term
    return torch.from_numpy(total)


def momentum_steps(G, changes, eta, beta):
    """FedAvgM (arXiv 1909.06335): the state after each of these changes."""
    V, states = torch.zeros_like(G), []
    for change in changes:
        V = beta * V + change
        G = G + eta * V
        states.append(G)
    return states
