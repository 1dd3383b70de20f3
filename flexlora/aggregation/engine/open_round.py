"""One open round of any method: updates in any order of arrival, added in one fixed order.

A floating-point sum depends on its order, so the order is a function of which clients were asked:
by rank, then by client id, late updates last. An update that arrives before its turn waits, on disk
beyond ``waiting_bytes``. The resulting bits depend on the set of updates alone, and the memory of a
round is that of its sums.

Two bounds keep one client from making the round its own: on the norm of its update
(``norm_bound.py``) and on its share of the weight (``weight_cap.py``). Where they need to know the
others first, the update waits for them, at most until ``settle``.

Against several hostile clients a robust rule (``robust_rules.py``) weighs all updates by their
inner products (``change_gram.py``), in place of examples, discounts and the bound on shares. Then
every update waits until the round is complete.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from flexlora.aggregation.engine.change_gram import gram_of_waiting
from flexlora.aggregation.engine.factor_gap import FactorGap
from flexlora.aggregation.engine.gaussian_sum import GaussianSum
from flexlora.aggregation.engine.method import Method
from flexlora.aggregation.engine.norm_bound import NormBound, Norms
from flexlora.aggregation.engine.robust_rules import RobustMean
from flexlora.aggregation.engine.starts import Start
from flexlora.aggregation.engine.state import State
from flexlora.aggregation.engine.sums import Sums
from flexlora.aggregation.engine.updates import Update
from flexlora.aggregation.engine.waiting import WAITING_BYTES, WaitingUpdates
from flexlora.aggregation.engine.weight_cap import largest_share, weight_level
from flexlora.errors import UpdateRefused

__all__ = ["OpenRound", "Settled"]

UNBOUNDED = NormBound(factor=0.0)
ROUNDING = 1e-9  # an update this near its largest share waits until the round is complete


@dataclass(frozen=True, kw_only=True)
class Settled:
    """By the updates' keys: why some are not in the sum, and how many times others count in it.

    ``shares`` are factors below 1, of updates beyond their share of the weight. ``weights`` are a
    robust rule's, all updates': 1 is the weight in the plain mean. ``norms`` are those of the
    updates in the sum.
    """

    refused: Mapping[str, str] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    norms: tuple[Norms, ...] = ()


class OpenRound:
    """Accumulates the sums that ``method`` needs and closes them into the next state.

    Args:
        sent: the start that each rank class's clients decoded, by class; starts of earlier rounds,
            of which updates may still come, under other names.
        clients: the clients that were asked, each with the name of its rank class. Updates are then
            added as soon as all before them are in; without ``clients`` they wait for ``close``.
        factor_gap: report by module how far averaging factors would be from averaging products.
        bound: of the norms of updates that have them.
        most_updates: how many updates may come at most, where shares are bounded; 0: they are not.
        private: clips the changes and adds noise to their sum, also where no update came.
        robust: weighs the updates; a round of fewer than ``least_updates`` changes nothing.
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
        bound: NormBound = UNBOUNDED,
        most_updates: int = 0,
        private: GaussianSum | None = None,
        robust: RobustMean | None = None,
    ) -> None:
        self.method, self.state, self.sent = method, state, sent
        shapes, device = state.change.shapes, state.device
        self.sums = Sums(method.needs, shapes, sent, device, private, state.dtype)
        self._always_closes = private is not None
        self._gap = FactorGap(shapes, sent, device) if factor_gap else None
        self._sums = (self.sums,) if self._gap is None else (self.sums, self._gap)
        self._places = {
            client_id: (False, sent[name].rank_class.rank if name in sent else 0, client_id)
            for client_id, name in (clients or {}).items()
        }
        self._order = sorted(self._places, key=self._places.__getitem__)
        self._next = 0
        self._norms: dict[str, Norms | None] = {}  # of the updates that are in
        self._weights: dict[str, float] = {}
        self._skipped: set[str] = set()
        self._waiting = WaitingUpdates(waiting_bytes)
        self._robust = robust
        self._bound, self._most_updates = bound, 0 if robust else most_updates
        self._settled: Settled | None = None

    @property
    def decides(self) -> bool:
        """Whether ``add`` knows the bound of norms; else ``settle`` may still refuse updates."""
        return self._bound.decides

    @property
    def least_updates(self) -> int:
        """The fewest updates with which the round changes anything."""
        return 0 if self._robust is None else self._robust.least

    def add(self, update: Update) -> None:
        """Take one checked update: added to the sums now or when all before it are in.

        Raises:
            UpdateRefused: a second update of a client, one of a client that was skipped, one whose
                start the method has to know and this round did not send, or one whose norm is
                beyond the bound, where that is known. The round is then as it was.
        """
        if update.key in self._norms:
            raise UpdateRefused(f"client {update.client_id}: a second update in the same round.")
        if update.key in self._skipped:
            raise UpdateRefused(f"client {update.client_id}: this round went on without it.")
        self.sums.check(update)
        if self._bound.decides and (cause := self._refusal(update.norms)):
            raise UpdateRefused(f"client {update.client_id}: {cause}")
        if update.discount == 0.0:  # in no denominator either: the round is the one without it
            self.skip(update.key)
            return
        self._norms[update.key] = update.norms
        self._weights[update.key] = update.discount * self.method.needs.weight(update)
        self._places.setdefault(update.key, self._place(update))
        self._waiting.put(update)
        self._accumulate_ready()

    def skip(self, client_id: str) -> None:
        """No update of this client will come: those after it need not wait for it."""
        if client_id not in self._norms:
            self._skipped.add(client_id)
            self._accumulate_ready()

    def settle(self) -> Settled:
        """Apply both bounds and the robust rule, now that no further update will come."""
        if self._settled is None:
            refused = self._refuse_beyond_bound()
            level = self._level(0) if self._most_updates else None
            shares = {
                key: level / weight
                for key, weight in sorted(self._weights.items())
                if level is not None and weight > level
            }
            norms = tuple(norms for norms in self._norms.values() if norms is not None)
            self._settled = Settled(
                refused=refused, shares=shares, weights=self._robust_weights(), norms=norms
            )
        return self._settled

    def close(self) -> State:
        """The next state; without noise the unchanged one if no update came, or too few did."""
        settled = self.settle()
        too_few = len(self._norms) < max(1, self.least_updates)
        if too_few and not self._always_closes:
            self._waiting.close()
            return self.state.unchanged()
        for key in self._in_order():
            update, weight = self._waiting.take(key), settled.weights.get(key)
            if key in settled.shares:
                update = replace(update, discount=update.discount * settled.shares[key])
            for sums in self._sums if weight != 0.0 else ():
                sums.add(update, weight)
        self._waiting.close()
        state = self.method.close(self.state, self.sums)
        self.sums.clear()
        if self._gap is None:
            return state
        gaps = self._gap.report()
        modules = {name: {**state.modules.get(name, {}), **gap} for name, gap in gaps.items()}
        return replace(state, modules=modules)

    def _in_order(self) -> list[str]:
        """The keys of the waiting updates, in the order in which they are added."""
        return sorted(self._waiting, key=self._places.__getitem__)

    def _robust_weights(self) -> dict[str, float]:
        """``n c_k`` of every update, by the rule; none without a rule, or of too few updates."""
        keys = self._in_order()
        if self._robust is None or len(keys) < self._robust.least:
            return {}
        starts = {name: start.trained for name, start in self.sent.items()}
        gram = gram_of_waiting(self._waiting, keys, starts, self.state.device)
        coefficients = self._robust.coefficients(gram).tolist()
        return {key: len(keys) * c for key, c in zip(keys, coefficients, strict=True)}

    def _place(self, update: Update) -> tuple[bool, int, str]:
        """The place of an update of no listed client: late ones after all others."""
        start = self.sent.get(update.rank_class)
        if start is None:
            return bool(self._order), 0, update.key
        late = start.base_round != self.state.round
        return late or bool(self._order), start.rank_class.rank, update.key

    def _refusal(self, norms: Norms | None) -> str:
        return "" if norms is None else self._bound.refusal(norms)

    def _refuse_beyond_bound(self) -> dict[str, str]:
        """Judge the updates that had to wait for the others' norms; drops the refused ones."""
        if self._bound.decides:
            return {}
        self._bound = self._bound.with_round(norms for norms in self._norms.values() if norms)
        causes = {key: self._refusal(norms) for key, norms in self._norms.items()}
        refused = {key: cause for key, cause in sorted(causes.items()) if cause}
        for key in refused:
            self._waiting.take(key)
            del self._norms[key], self._weights[key]
            self._skipped.add(key)
        return refused

    def _level(self, more: int) -> float:
        """The weight above which updates are cut, if ``more`` may come beside those that are in."""
        weights = list(self._weights.values())
        count = sum(weight > 0.0 for weight in weights) + more
        return weight_level(weights, largest_share(count) if count else None)

    def _accumulate_ready(self) -> None:
        """Add what comes next in the order, as far as both bounds certainly allow it."""
        if not self._bound.decides or self._robust is not None:
            return
        level = None
        if self._most_updates:
            level = (1.0 - ROUNDING) * self._level(max(0, self._most_updates - len(self._weights)))
        while self._next < len(self._order):
            key = self._order[self._next]
            if key in self._waiting:
                if level is not None and self._weights[key] > level:
                    return
                update = self._waiting.take(key)
                for sums in self._sums:
                    sums.add(update)
            elif key not in self._skipped:
                return
            self._next += 1
