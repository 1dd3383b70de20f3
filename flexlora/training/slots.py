"""A base model whose targets are LoRA layers, with K slots to load, train and read.

Training and evaluation work on a ``SlotModel``. The trained factors of all slots are in one
buffer ``parameters [K, P]``, of which the layers have views, and gradients are one
``gradients [K, P]``. So an optimizer step, the slots' gradient norms and learning rates are a few
operations on a matrix, independent of the number of modules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from flexlora.algebra.sketch import GradientSketch, top_rows
from flexlora.lora.adapters import Adapter, LoRAFactors, zero_factors
from flexlora.training.blockwise import Live, live_numbers
from flexlora.training.layers import (
    DropoutStream,
    GradientObserver,
    LoRALinear,
    PassShape,
    SlotFactors,
    fill,
)
from flexlora.training.row_gradients import RowGradients
from flexlora.training.targets import choose_targets, find_targets

__all__ = ["SlotModel", "find_targets", "kept_rank", "slot_model"]

_SLOTS = "_flexlora_slots"  # the attribute of a model that has its SlotModel


class SlotModel:
    """A frozen ``model`` with LoRA layers injected; ``shapes`` names the targets in model order."""

    def __init__(self, model: Any, target_modules: str = "all-linear") -> None:
        self.model, self.target_modules = model, target_modules
        _keep_unpacked(model)
        self.targets = choose_targets(model, target_modules)
        self.shapes = self.targets.shapes
        self.layers: dict[str, LoRALinear] = {}
        self.pass_shape = PassShape()
        self._watch = _watched(model, self.pass_shape)
        self.num_slots = 0
        self.parameters = self.gradients = torch.empty(0, 0)
        self._leaves: list[Tensor] = []
        self._spans: dict[tuple[str, str], slice] = {}  # of each module and factor in a row
        self._templates: list[Adapter] = []
        for name, (out_features, in_features) in self.shapes.items():
            base = model.get_submodule(name)
            layer = LoRALinear(base, name=name, in_features=in_features, out_features=out_features)
            layer.pass_shape = self.pass_shape
            _replace(model, name, layer)
            self.layers[name] = layer

    def remove(self) -> None:
        """Put the plain linears back."""
        for name, layer in self.layers.items():
            _replace(self.model, name, layer.base)
        self.layers = {}
        self._watch.remove()
        if getattr(self.model, _SLOTS, None) is self:
            delattr(self.model, _SLOTS)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the targets store their weights as ``[in, out]`` (GPT-2's ``Conv1D``)."""
        return all(type(layer.base).__name__ == "Conv1D" for layer in self.layers.values())

    def load(
        self,
        adapters: Sequence[Adapter],
        *,
        carried: Sequence[Adapter | None] | None = None,
        carried_dtype: torch.dtype | None = None,
        trainable: Sequence[str] = (),
        merge: bool = False,
    ) -> None:
        """One adapter per slot; factors named in ``trainable`` get gradients, the rest is frozen.

        Slots that carry equal adapters share one copy. With ``merge`` it is added into a copy of
        each float weight; quantized weights keep it as separate factors.

        Raises:
            ValueError: an adapter whose modules or shapes are not the model's.
        """
        for adapter in adapters:
            self._check(adapter)
        self.clear()
        self.num_slots, self._templates = len(adapters), list(adapters)
        views, distinct = self._allocate(trainable), _once(carried or ())
        for name, layer in self.layers.items():
            layer.num_slots = self.num_slots
            frozen = [a[name] if a is not None else None for a in distinct]
            if any(factors is not None for factors in frozen):
                whole = [f or zero_factors(self._templates[0][name]) for f in frozen]
                if not (merge and len(whole) == 1 and layer.merge(whole[0])):
                    layer.carried = self._stack(name, whole, carried_dtype)
            layer.trained = self._stack(name, [a[name] for a in adapters], views=views)

    def accumulate_gradients(self, loss: Tensor) -> None:
        """Add ``d loss / d parameters`` to ``gradients [K, P]``; padding gets exact zeros."""
        # A target that the pass did not reach has no gradient: zeros.
        parts = torch.autograd.grad(loss, self._leaves, materialize_grads=True)
        self.gradients += torch.cat([part.flatten(1) for part in parts], dim=1)

    def _allocate(self, trainable: Sequence[str]) -> dict[tuple[str, str], Tensor]:
        """The flat buffers with the adapters' factors, and views of them that get gradients.

        The views are by module and factor: ``[K, R, in]``, ``[K, out, R]``.
        """
        K = self.num_slots
        shapes: dict[tuple[str, str], tuple[int, int, int]] = {}
        for name, (out_features, in_features) in self.shapes.items():
            R = max(adapter[name].rank for adapter in self._templates)
            both = {"lora_A": (K, R, in_features), "lora_B": (K, out_features, R)}
            shapes |= {(name, label): both[label] for label in trainable}
        dtype = next(iter(self._templates[0].values())).lora_A.dtype if K else torch.float32
        ends = list(accumulate(a * b for _, a, b in shapes.values()))
        host = torch.zeros(K, ends[-1] if ends else 0, dtype=dtype)
        for (name, label), shape, end in zip(shapes, shapes.values(), ends, strict=True):
            self._spans[name, label] = slice(end - shape[1] * shape[2], end)
            place = host[:, self._spans[name, label]].view(shape)
            fill(place, [getattr(adapter[name], label) for adapter in self._templates])
        self.parameters = host.to(self.device)  # one copy: tens of thousands of small ones are slow
        self.gradients = torch.zeros_like(self.parameters)
        views = {k: self.parameters[:, s].view(shapes[k]) for k, s in self._spans.items()}
        self._leaves = [view.requires_grad_() for view in views.values()]
        return views

    def live_numbers(self) -> list[Live]:
        """Each slot's numbers in ``parameters`` without padding; one object for equal ranks."""
        names, labels = zip(*self._spans, strict=True)
        ranks = [tuple(adapter[name].rank for name in names) for adapter in self._templates]
        inside = {r: live_numbers(self._leaves, labels, r) for r in dict.fromkeys(ranks)}
        return [inside[r] for r in ranks]

    def _stack(
        self,
        name: str,
        slots: Sequence[LoRAFactors],
        dtype: torch.dtype | None = None,
        views: Mapping[tuple[str, str], Tensor] | None = None,
    ) -> SlotFactors:
        """The factors of one module, those in ``views`` as views."""
        like = torch.empty(0, dtype=dtype or slots[0].lora_A.dtype, device=self.device)
        held = {label: (views or {}).get((name, label)) for label in ("lora_A", "lora_B")}
        return SlotFactors.stack(slots, like, **held)

    def tail_norms(self, kept_fraction: float) -> Tensor:
        """``sum over modules |B_tail|_F |A_tail|_F`` of each slot, ``[K]``, with gradients.

        The tail of a slot's module is its terms from ``kept_rank(kept_fraction, rank)`` on.
        """
        total = self.parameters.new_zeros(self.num_slots)
        for name, layer in self.layers.items():
            assert layer.trained is not None
            A, B = layer.trained.A, layer.trained.B
            first = [kept_rank(kept_fraction, adapter[name].rank) for adapter in self._templates]
            terms = torch.arange(A.shape[1], device=A.device)
            tail = (terms[None] >= torch.tensor(first, device=A.device)[:, None]).to(A.dtype)
            # Padding is zero in both factors, and the root of zero has no gradient.
            size_A = ((A.square().sum(2) * tail).sum(1) + 1e-24).sqrt()
            size_B = ((B.square().sum(1) * tail).sum(1) + 1e-24).sqrt()
            total = total + size_A * size_B
        return total

    def _check(self, adapter: Adapter) -> None:
        if set(adapter) != set(self.shapes):
            name = sorted(set(adapter) ^ set(self.shapes))[0]
            raise ValueError(
                f"module '{name}' is in the {'adapter' if name in adapter else 'model'} only; "
                f"was the adapter made for lora.target-modules '{self.target_modules}'?"
            )
        for name, factors in adapter.items():
            shape = (factors.out_features, factors.in_features)
            if shape != self.shapes[name]:
                raise ValueError(
                    f"module '{name}': the adapter is {shape}, the model {self.shapes[name]} "
                    "= (out_features, in_features). Was it made for another base?"
                )

    def extract(self, slot: int) -> Adapter:
        """The factors of one slot as they are now, copied to the CPU, at the slot's own ranks."""
        row, modules = self.parameters[slot].cpu(), {}
        for name, layer in self.layers.items():
            factors = self._templates[slot][name]
            assert layer.trained is not None
            both = {}
            for label, held in (("lora_A", layer.trained.A), ("lora_B", layer.trained.B)):
                span = self._spans.get((name, label))
                whole = held[slot].cpu() if span is None else row[span].view(held.shape[1:])
                inside = whole[: factors.rank] if label == "lora_A" else whole[:, : factors.rank]
                both[label] = inside.detach().clone()
            modules[name] = replace(factors, lora_A=both["lora_A"], lora_B=both["lora_B"])
        return Adapter(modules)

    @contextmanager
    def sketching(self, seed: int) -> Iterator[None]:
        """Sketch every target's gradient in the backward passes inside, then align ``lora_A``.

        Afterwards ``lora_A`` of each slot has the top right singular vectors of its gradient.
        """
        sketches = {
            name: GradientSketch(
                name=name,
                ranks=[adapter[name].rank for adapter in self._templates],
                out_features=layer.out_features,
                seed=seed,
            )
            for name, layer in self.layers.items()
        }
        with self._observed_by(sketches):
            yield
            self._align(sketches)

    @contextmanager
    def recording_rows(self, rows: int) -> Iterator[RowGradients]:
        """Record the gradient of each of the ``rows`` of a pass in the backward pass inside."""
        recorded = RowGradients(self.parameters, rows=rows, spans=self._spans)
        with self._observed_by({k: recorded.of(k, layer) for k, layer in self.layers.items()}):
            yield recorded

    @contextmanager
    def _observed_by(self, observers: Mapping[str, GradientObserver]) -> Iterator[None]:
        try:
            for name, layer in self.layers.items():
                layer.observer = observers[name]
            yield
        finally:
            for layer in self.layers.values():
                layer.observer = None

    @torch.no_grad()
    def _align(self, gradients: Mapping[str, GradientSketch]) -> None:
        """The top rows of all sketches, those of equal shape and rank together.

        A call decomposes as many numbers as the largest sketch has, so it takes no more memory.
        """
        alike: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
        for name, layer in self.layers.items():
            assert layer.trained is not None
            total = gradients[name].total
            if total is None:
                continue
            for slot, size in enumerate(gradients[name].sizes):
                sketch = total[slot, :size]
                rows = layer.trained.A[slot, : self._templates[slot][name].rank]
                alike.setdefault((*sketch.shape, len(rows)), []).append((sketch, rows))
        largest = max((size * in_features for size, in_features, _ in alike), default=0)
        for (size, in_features, rank), pairs in alike.items():
            count = largest // (size * in_features)
            for at in range(0, len(pairs), count):
                sketches, rows = map(torch.stack, zip(*pairs[at : at + count], strict=True))
                for (_, old), new in zip(pairs[at:], top_rows(sketches, rank, rows), strict=False):
                    old.copy_(new)

    def clear(self) -> None:
        """Remove all slots: the model is the frozen base."""
        self.num_slots, self._templates, self._leaves, self._spans = 0, [], [], {}
        self.parameters = self.gradients = torch.empty(0, 0)
        for layer in self.layers.values():
            layer.trained = layer.carried = layer.merged = layer.slot_weights = None
            layer.num_slots, layer.dropout, layer.streams = 0, 0.0, ()

    def set_dropout(self, dropout: float, streams: Sequence[DropoutStream | None]) -> None:
        """Set the masks of the next pass, one stream per slot; none for no dropout."""
        for layer in self.layers.values():
            layer.dropout, layer.streams = dropout, tuple(streams)

    @contextmanager
    def first_slots(self, count: int) -> Iterator[None]:
        """Inside the block, batches have rows of the first ``count`` slots only."""
        try:
            for layer in self.layers.values():
                layer.num_slots = count
            yield
        finally:
            for layer in self.layers.values():
                layer.num_slots = self.num_slots


def _once(carried: Sequence[Adapter | None]) -> Sequence[Adapter | None]:
    """``carried``, or its first adapter alone if all are equal."""
    if not carried or carried[0] is None:
        return carried
    first = carried[0]
    if all(other is first for other in carried):
        return carried[:1]
    digest = first.digest()
    same = all(other is not None and other.digest() == digest for other in carried[1:])
    return carried[:1] if same else carried


def kept_rank(kept_fraction: float, rank: int) -> int:
    """``max(1, floor(kept_fraction * rank))``: the rank after self-pruning."""
    return max(1, int(kept_fraction * rank + 1e-9))


def _keep_unpacked(model: Any) -> None:
    """Stop 4-bit linears from repacking their weights on a CPU.

    bitsandbytes repacks them in place for an inference kernel without a gradient: earlier modules
    would train on the gradient of another matrix, or on none.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False


def _watched(model: nn.Module, shape: PassShape) -> Any:
    """Write the rows and width of every pass of ``model`` into ``shape``; a removable hook."""

    def begin(module: nn.Module, args: tuple, kwargs: dict) -> None:
        named = (kwargs.get(name) for name in ("input_ids", "inputs_embeds"))
        tokens = next((x for x in (*named, *args) if isinstance(x, Tensor)), None)
        shape.rows, shape.width = (0, 0) if tokens is None else tokens.shape[:2]

    return model.register_forward_pre_hook(begin, with_kwargs=True)


def slot_model(model: Any, target_modules: str) -> SlotModel:
    """The ``SlotModel`` of ``model``, injected again if the targets differ."""
    current = getattr(model, _SLOTS, None)
    if current is not None:
        if current.target_modules == target_modules:
            return current
        current.remove()
    slots = SlotModel(model, target_modules)
    setattr(model, _SLOTS, slots)
    return slots


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
