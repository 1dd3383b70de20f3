"""One open round of any method: updates in any order of arrival, added in one fixed order.

A floating-point sum depends on its order, so the order is a function of which clients were asked:
by rank, then by client id, late updates last. An update that arrives before its turn waits, on disk
beyond ``waiting_bytes``. The resulting bits depend on the set of updates alone, and the memory of a
round is that of its sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from flexlora.aggregation.engine.factor_gap import FactorGap
from flexlora.aggregation.engine.method import Method
from flexlora.aggregation.engine.starts import Start
from flexlora.aggregation.engine.state import State
from flexlora.aggregation.engine.sums import Sums
from flexlora.aggregation.engine.updates import Update
from flexlora.aggregation.engine.waiting import WAITING_BYTES, WaitingUpdates
from flexlora.errors import UpdateRefused

__all__ = ["OpenRound"]


class OpenRound:
    """Accumulates the sums that ``method`` needs and closes them into the next state.

    Args:
        sent: the start that each rank class's clients decoded, by class; starts of earlier rounds,
            of which updates may still come, under other names.
        clients: the clients that were asked, each with the name of its rank class. Updates are then
            added as soon as all before them are in; without ``clients`` they wait for ``close``.
        factor_gap: report by module how far averaging factors would be from averaging products.
    """

    def __init__(
        self,
        method: Method,
        state: State,
        sent: Mapping[str, Start],
        clients: Mapping[str, str] | None = None,
        *,
        factor_gap: bool = False,
        waiting_bytes: int = WAITING_BYTES,
    ) -> None:
        self.method, self.state, self.sent = method, state, sent
        shapes, device = state.change.shapes, state.device
        self.sums = Sums(method.needs, shapes, sent, device)
        self._gap = FactorGap(shapes, sent, device) if factor_gap else None
        self._sums = (self.sums,) if self._gap is None else (self.sums, self._gap)
        self._places = {
            client_id: (False, sent[name].rank_class.rank if name in sent else 0, client_id)
            for client_id, name in (clients or {}).items()
        }
        self._order = sorted(self._places, key=self._places.__getitem__)
        self._next = 0
        self._seen: set[str] = set()
        self._skipped: set[str] = set()
        self._waiting = WaitingUpdates(waiting_bytes)

    def add(self, update: Update) -> None:
        """Take one checked update: added to the sums now or when all before it are in.

        Raises:
            UpdateRefused: a second update of a client, one of a client that was skipped, or one
                whose start the method has to know and this round did not send. The round is then
                as it was.
        """
        if update.key in self._seen:
            raise UpdateRefused(f"client {update.client_id}: a second update in the same round.")
        if update.key in self._skipped:
            raise UpdateRefused(f"client {update.client_id}: this round went on without it.")
        self.sums.check(update)
        if update.discount == 0.0:  # in no denominator either: the round is the one without it
            self.skip(update.key)
            return
        self._seen.add(update.key)
        self._places.setdefault(update.key, self._place(update))
        self._waiting.put(update)
        self._accumulate_ready()

    def skip(self, client_id: str) -> None:
        """No update of this client will come: those after it need not wait for it."""
        if client_id not in self._seen:
            self._skipped.add(client_id)
            self._accumulate_ready()

    def close(self) -> State:
        """The next state; the unchanged one if no update came."""
        if not self._seen:
            return self.state.unchanged()
        for client_id in sorted(self._waiting, key=self._places.__getitem__):
            update = self._waiting.take(client_id)
            for sums in self._sums:
                sums.add(update)
        self._waiting.close()
        state = self.method.close(self.state, self.sums)
        self.sums.clear()
        if self._gap is None:
            return state
        gaps = self._gap.report()
        modules = {name: {**state.modules.get(name, {}), **gap} for name, gap in gaps.items()}
        return replace(state, modules=modules)

    def _place(self, update: Update) -> tuple[bool, int, str]:
        """The place of an update of no listed client: late ones after all others."""
        start = self.sent.get(update.rank_class)
        if start is None:
            return bool(self._order), 0, update.key
        late = start.base_round != self.state.round
        return late or bool(self._order), start.rank_class.rank, update.key

    def _accumulate_ready(self) -> None:
        while self._next < len(self._order):
            client_id = self._order[self._next]
            if client_id in self._waiting:
                update = self._waiting.take(client_id)
                for sums in self._sums:
                    sums.add(update)
            elif client_id not in self._skipped:
                return
            self._next += 1
