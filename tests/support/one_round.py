"""Rounds of a method without a network: classes are sent starts, clients "train" by seeded noise.

Every update that is made here passes ``check_update`` against what its client was sent, so a test
cannot feed a method what the server would refuse. Factors that a start freezes come back as sent.
"""

from __future__ import annotations

from dataclasses import replace

import torch

import reference
from flexlora.aggregation import make_method
from flexlora.aggregation.engine.open_round import OpenRound
from flexlora.aggregation.engine.starts import Factoring
from flexlora.aggregation.engine.state import GlobalChange, State
from flexlora.aggregation.engine.updates import Update, check_update
from flexlora.algebra.linalg import FactoredSVD
from flexlora.lora.adapters import Adapter
from flexlora.lora.ranks import RankClass
from flexlora.wire.encoding import over_the_wire

SHAPES = {"attn.q": (12, 12), "attn.v": (6, 12), "mlp.up": (20, 12)}
RANKS = (2, 3, 7)
CLASSES = tuple(RankClass(name=f"rank_{rank}", rank=rank) for rank in RANKS)


def global_change(rank=5, *, seed=0, dtype=torch.float64, shapes=SHAPES):
    """A random G whose singular values fall by a third from one to the next."""
    modules = {}
    for i, (name, (m, n)) in enumerate(shapes.items()):
        generator = torch.Generator().manual_seed(seed * 100 + i)
        U, _ = torch.linalg.qr(torch.randn(m, rank, generator=generator, dtype=torch.float64))
        V, _ = torch.linalg.qr(torch.randn(n, rank, generator=generator, dtype=torch.float64))
        S = 0.67 ** torch.arange(rank, dtype=torch.float64)
        modules[name] = FactoredSVD(U=U.to(dtype), S=S.to(dtype), Vh=V.T.contiguous().to(dtype))
    return GlobalChange(modules)


def no_change(shapes=SHAPES, dtype=torch.float64):
    """The state before any training."""
    return State(round=0, change=GlobalChange.zero(shapes, dtype))


def noisy(adapter, labels, seed, size=0.2):
    """The adapter with noise on the factors that ``labels`` names; the others keep their bits."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name, factors in adapter.items():
        tensors = {label: getattr(factors, label) for label in labels}
        for label, tensor in tensors.items():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensors[label] = tensor + size * noise.to(tensor.dtype)
        modules[name] = replace(factors, **tensors)
    return Adapter(modules)


class OneRound:
    """One round of ``method`` from ``state``: what is sent, what comes back, the next state.

    ``alphas`` gives rank classes an alpha of their own, by position.
    """

    def __init__(
        self, method, state=None, *, wire="float64", classes=CLASSES, alphas=None, **factoring
    ):
        self.method = make_method(method) if isinstance(method, str) else method
        self.state = no_change() if state is None else state
        alphas = alphas or [factoring.pop("alpha", 16.0)]
        self.sent = {}
        for i, rank_class in enumerate(classes):
            chosen = Factoring(alpha=alphas[i % len(alphas)], **factoring)
            start = self.method.start(self.state, rank_class, chosen)
            carried = start.carried and over_the_wire(start.carried, wire)
            trained = over_the_wire(start.trained, wire)
            self.sent[rank_class.name] = replace(start, trained=trained, carried=carried).sealed()

    def start(self, k, rank_class=None):
        """What client k starts from; classes are dealt in turn."""
        chosen = rank_class or list(self.sent)[k % len(self.sent)]
        return self.sent[chosen].for_client(f"client_{k}")

    def update(self, k, num_examples=1, *, rank_class=None, trained=True, pruned=0, seed=0):
        """What client k sends back; ``pruned`` terms are dropped (HetLoRA)."""
        start = self.start(k, rank_class)
        adapter, local = start.trained, start.local
        if trained:
            adapter = noisy(adapter, start.trainable, 1000 * seed + 100 * self.state.round + k)
        if pruned:
            adapter = Adapter({n: f.terms(range(f.rank - pruned)) for n, f in adapter.items()})
        update = Update(
            client_id=f"client_{k}",
            adapter=adapter,
            num_examples=num_examples,
            rank_class=start.rank_class.name,
            base_round=self.state.round,
            digest=start.digest,
        )
        check_update(update, start.trained, digest=start.digest, local=local)
        return update

    def open(self, clients=None, **options):
        return OpenRound(self.method, self.state, self.sent, clients, **options)

    def finish(self, updates, clients=None, **options):
        """The state after these updates."""
        opened = self.open(clients, **options)
        for update in updates:
            opened.add(update)
        return opened.close()


def next_state(method, state=None, *, seed=0, count=6, **options):
    """The state after one trained round of ``count`` clients of all classes."""
    round_ = OneRound(method, state, **options)
    return round_.finish([round_.update(k, 10 + 7 * k, seed=seed) for k in range(count)])


def same_bits(first, second):
    """Whether two changes, or two states with all that they hold, are equal bit by bit."""
    if isinstance(first, State):
        return (
            same_bits(first.change, second.change)
            and set(first.extra) == set(second.extra)
            and all(torch.equal(first.extra[key], second.extra[key]) for key in first.extra)
        )
    return all(
        torch.equal(getattr(first[name], part), getattr(second[name], part))
        for name in first
        for part in ("U", "S", "Vh")
    )


def distance(change, dense):
    """Largest relative error of any module against dense matrices, a change or an adapter."""
    if hasattr(dense, "delta_weight"):
        dense = {name: dense.delta_weight(name) for name in dense}
    return max(reference.relative_error(change.delta_weight(n), dense[n]) for n in change)
