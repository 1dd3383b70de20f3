"""One open round: updates in any order of arrival, folded in one fixed order, in bounded memory.

A sum of floating-point numbers depends on its order, so the order is a function of who was asked:
by rank, then by client id, late updates last. An update that comes early waits; what waits beyond a
limit waits on disk. So the bits are those of the set of clients, the memory is that of the sums.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file, save_file

from flexlora.aggregation.engine.factor_gap import FactorGap, rows_of
from flexlora.aggregation.engine.method import Start, State, Update
from flexlora.aggregation.engine.product_sums import ProductSums
from flexlora.errors import UpdateRefused
from flexlora.lora.adapters import Adapter, LoRAFactors

__all__ = ["OpenRound"]

WAITING_BYTES = 1 << 27


class OpenRound:
    """Keeps the order; ``fold`` takes one update at a time, ``close`` makes the next state.

    Args:
        products: sums that every update is added to by its number of examples, beside ``fold``.
        clients: who was asked, with the name of each one's rank class; empty when that is not
            known, and then everything waits for ``finish``.
        admit: raises ``UpdateRefused`` for an update that this method cannot use.
    """

    def __init__(
        self,
        state: State,
        sent: Mapping[str, Start],
        clients: Mapping[str, str] | None,
        *,
        close: Callable[[], State],
        fold: Callable[[Update], None] | None = None,
        products: ProductSums | None = None,
        admit: Callable[[Update], None] | None = None,
        waiting_bytes: int = WAITING_BYTES,
    ) -> None:
        self.state, self.sent, self._close, self._admit = state, sent, close, admit
        self._fold_own, self._products = fold, products
        self._gap = FactorGap(state.change.shapes, products)
        self._keys = {
            client_id: (False, sent[name].rank_class.rank if name in sent else 0, client_id)
            for client_id, name in (clients or {}).items()
        }
        self._order = sorted(self._keys, key=self._keys.__getitem__)
        self._then: list[Callable[[State], State]] = []
        self._next = 0
        self._seen: set[str] = set()
        self._skipped: set[str] = set()
        self._waiting = _Waiting(waiting_bytes)

    def add(self, update: Update) -> None:
        """Fold in one checked update, or let it wait for those before it.

        Raises:
            UpdateRefused: a second update of a client, one of a client that was skipped, or one
                that the method cannot use.
        """
        if update.key in self._seen:
            raise UpdateRefused(f"client {update.client_id}: a second update in the same round.")
        if update.key in self._skipped:
            raise UpdateRefused(f"client {update.client_id}: this round went on without it.")
        if self._admit is not None:
            self._admit(update)
        self._seen.add(update.key)
        self._keys.setdefault(update.key, self._place(update))
        self._waiting.put(update)
        self._fold_ready()

    def _place(self, update: Update) -> tuple[bool, int, str]:
        """Where an update comes in that nobody waits for: late ones after all others."""
        start = self.sent.get(update.rank_class)
        if start is None:
            return bool(self._order), 0, update.key
        late = start.base_round != self.state.round
        return late or bool(self._order), start.rank_class.rank, update.key

    def skip(self, client_id: str) -> None:
        """This client will not be added: nobody waits for it."""
        if client_id not in self._seen:
            self._skipped.add(client_id)
            self._fold_ready()

    def finish(self) -> State:
        """The next state; without any update the last one, one round later."""
        if not self._seen:
            return self._after(self.state.one_round_later())
        for client_id in sorted(self._waiting, key=self._keys.__getitem__):
            self._fold(self._waiting.take(client_id))
        self._waiting.close()
        gaps = self._gap.report()
        state = self._after(self._close())
        if self._products is not None:
            self._products.clear()
        modules = {name: {**state.modules.get(name, {}), **gap} for name, gap in gaps.items()}
        return replace(state, modules=modules)

    def _after(self, state: State) -> State:
        for further in self._then:
            state = further(state)
        return state

    def then(self, further: Callable[[State], State]) -> None:
        """Do this to the next state before it is handed out."""
        self._then.append(further)

    def _fold(self, update: Update) -> None:
        update = update.weighed()
        self._gap.add(update, rows_of(update, self.sent))
        if self._products is not None:
            self._products.add(update.adapter, update.num_examples)
        if self._fold_own is not None:
            self._fold_own(update)

    def _fold_ready(self) -> None:
        while self._next < len(self._order):
            client_id = self._order[self._next]
            if client_id in self._waiting:
                self._fold(self._waiting.take(client_id))
            elif client_id not in self._skipped:
                return
            self._next += 1


class _Waiting:
    """Updates by client id: in memory up to a number of bytes, the rest in a temporary folder."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes, self.held_bytes = limit_bytes, 0
        self._held: dict[str, Update] = {}
        self._on_disk: dict[str, Path] = {}
        self._folder: tempfile.TemporaryDirectory | None = None
        self._written = 0

    def __contains__(self, client_id: str) -> bool:
        return client_id in self._held

    def __iter__(self):
        return iter(list(self._held))

    def put(self, update: Update) -> None:
        own = update.adapter.num_bytes
        if self.held_bytes + own > self.limit_bytes:
            update = self._write(update)
        else:
            self.held_bytes += own
        self._held[update.key] = update

    def take(self, client_id: str) -> Update:
        update = self._held.pop(client_id)
        path = self._on_disk.pop(client_id, None)
        if path is None:
            self.held_bytes -= update.adapter.num_bytes
            return update
        # A file's tensors lie at any address, and which kernel runs on them, so which last bit
        # comes out, depends on the alignment: memory of their own.
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        path.unlink()
        modules = {
            name: replace(
                factors, lora_A=tensors[f"{name}.lora_A"], lora_B=tensors[f"{name}.lora_B"]
            )
            for name, factors in update.adapter.items()
        }
        return replace(update, adapter=Adapter(modules))

    def close(self) -> None:
        """Remove the folder now: who keeps the round need not keep it."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _write(self, update: Update) -> Update:
        """Put the tensors on disk and keep the rest: names, alphas, shapes without memory."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="flexlora-round-")
        path = Path(self._folder.name) / f"{self._written}.safetensors"
        self._written += 1
        tensors = {}
        for name, factors in update.adapter.items():
            tensors[f"{name}.lora_A"] = factors.lora_A.contiguous()
            tensors[f"{name}.lora_B"] = factors.lora_B.contiguous()
        save_file(tensors, path)
        self._on_disk[update.key] = path
        hollow = Adapter({name: _hollow(factors) for name, factors in update.adapter.items()})
        return replace(update, adapter=hollow)


def _hollow(factors: LoRAFactors) -> LoRAFactors:
    return factors.map(lambda tensor: tensor.to("meta"))
