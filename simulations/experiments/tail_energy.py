"""Energy in the tail of ``G`` while clients train, round by round, in a real run.

The tail of a module is ``G`` beyond the rank of the weakest class. After every round the
state is read from the run's own checkpoint:

    share     |tail(G_t)|^2 / |G_t|^2, all modules together
    kept      <tail(G_{t-1}), G_t> / |tail(G_{t-1})|^2: the part of the previous tail retained
    law       sum_j c_j S_j^2 / sum_j S_j^2 over that tail, c_j the share of the round's rows that
              clients of rank >= j sent: what the published form retains without training
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from flexlora.aggregation.engine.state import GlobalChange, State
from flexlora.algebra.linalg import FactoredSVD, inner_product
from flexlora.lora.ranks import RankClass
from flexlora.printable import from_cell
from flexlora.runs.checkpoints import load_checkpoint
from flexlora.server.observing.observer import Observer

__all__ = ["TailObserver", "kept_by_law", "kept_of_tail", "tail_share"]


class TailObserver(Observer):
    """Measures the checkpoint of every round."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.rounds: list[dict[str, object]] = []
        self._last: State | None = None

    def round_finished(self, metrics: Mapping[str, object]) -> None:
        """Measure the round's checkpoint, which is on disk before observers are called."""
        state, classes = load_checkpoint(self.run / "checkpoint")
        weak = weakest(classes, state.change)
        if self._last is not None and state.round > 1:
            last = self._last.change
            weights = _weights(self.run / "clients.csv", state.round, classes)
            self.rounds.append(
                {
                    "round": state.round,
                    "share": tail_share(state.change, weak),
                    "kept": kept_of_tail(last, state.change, weak),
                    "law": kept_by_law(last, weak, weights),
                    "loss": metrics.get("eval_loss"),
                }
            )
        self._last = state


def weakest(classes: Mapping[str, RankClass], change: GlobalChange) -> dict[str, int]:
    """The smallest rank that any class trains, by module."""
    ranks = [rank_class.ranks(change.shapes) for rank_class in set(classes.values())]
    return {name: min(by_module[name] for by_module in ranks) for name in change}


def tail_share(change: GlobalChange, weak: Mapping[str, int]) -> float:
    """The share of the energy above the weakest rank, all modules together."""
    return 1.0 - change.total_energy_kept(weak)


def kept_of_tail(last: GlobalChange, change: GlobalChange, weak: Mapping[str, int]) -> float | None:
    """``<tail(last), change> / |tail(last)|^2``: 1 where the tail is unchanged, 0 where it is lost.

    Training along the tail's directions counts too, so it may exceed 1; None without a tail.
    """
    shared = energy = 0.0
    for name, svd in last.items():
        tail, now = _tail(svd, weak[name]), change[name]
        shared += inner_product(tail.U * tail.S, tail.Vh, now.U * now.S, now.Vh)
        energy += float(tail.S.double().square().sum())
    return shared / energy if energy > 0 else None


def kept_by_law(
    last: GlobalChange, weak: Mapping[str, int], weights: Mapping[RankClass, int]
) -> float | None:
    """The same for a round of the published form with untrained updates of these classes."""
    kept = energy = 0.0
    rows = sum(weights.values())
    for name, svd in last.items():
        for j, value in enumerate(_tail(svd, weak[name]).S.double().tolist(), weak[name] + 1):
            ranks = ((kind.rank_of(name, *svd.shape), count) for kind, count in weights.items())
            kept += value**2 * sum(count for rank, count in ranks if rank >= j) / rows
            energy += value**2
    return kept / energy if energy > 0 else None


def _tail(svd: FactoredSVD, rank: int) -> FactoredSVD:
    return FactoredSVD(U=svd.U[:, rank:], S=svd.S[rank:], Vh=svd.Vh[rank:])


def _weights(
    file: Path, server_round: int, classes: Mapping[str, RankClass]
) -> dict[RankClass, int]:
    """The rows behind the updates of a round, by the class of the client that sent them."""
    weights: dict[RankClass, int] = {}
    with file.open(encoding="utf-8", newline="") as handle:
        for row in csv.DictReader(handle):
            if row["round"] == str(server_round) and row["status"] == "ok":
                kind = classes[from_cell(row["client_id"])]
                weights[kind] = weights.get(kind, 0) + int(row["num_examples"])
    return weights
