"""The rows of one round's clients, and the metrics of ``metrics.jsonl`` computed from them.

Metrics of the global change are functions of the state; those of scores are in ``evaluation.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from flexlora.aggregation.engine.starts import Start
from flexlora.aggregation.engine.state import State, effective_rank
from flexlora.algebra.linalg import energy_kept
from flexlora.lora.adapters import Adapter
from flexlora.lora.ranks import RankClass
from flexlora.planning.activations import FACTOR_BYTES
from flexlora.planning.memory import state_bytes
from flexlora.runs.audit import ROUND, AuditLog
from flexlora.runs.outcomes import Outcome
from flexlora.server.members.sampling import History
from flexlora.server.rounds.client_rows import ClientRow
from flexlora.server.transport.clocks import Clock

__all__ = ["RoundMetrics", "class_metrics", "memory_metrics", "module_metrics"]

# Directions whose singular values are recorded: about three to a doubling.
SPECTRUM = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
EQUAL_SECONDS = 1.0  # of every training where no clock measures clients: none is slow


@dataclass(kw_only=True)
class RoundMetrics:
    """The rows of one round, and their sums.

    ``measured`` is True where clients train on machines of their own, so that the seconds they
    report are theirs. Where one process trains all clients the seconds differ from run to run.
    ``summed`` are means of a secure sum, which no row has.
    """

    server_round: int
    measured: bool = True
    rows: list[ClientRow] = field(default_factory=list)
    bytes_carried: int = 0
    memory_bytes: Mapping[str, int] = field(default_factory=dict)
    resent: int = 0
    skipped: str = ""
    summed: dict[str, float | str] = field(default_factory=dict)

    def update_history(self, history: History) -> None:
        """Record the trainings in the sum; of two by one client, that of this round's message."""
        counted = [row for row in self.rows if row.outcome is Outcome.OK and row.has_loss]
        for row in sorted(counted, key=lambda row: not row.late):
            simulated = (
                EQUAL_SECONDS if math.isnan(row.simulated_seconds) else row.simulated_seconds
            )
            seconds = row.seconds if self.measured else simulated
            loss = 0.0 if math.isnan(row.train_loss) else row.train_loss  # of a secure sum
            history.learn(row.client_id, self.server_round, loss, seconds)

    def log(
        self, audit: AuditLog, state_round: int, fingerprint: str, wire: str, checkpoint: str
    ) -> None:
        """The line of the round in the audit log, before its ``checkpoint`` is the current one."""
        rows = sorted(self.rows, key=lambda row: (row.client_id, row.late))
        audit.append(
            ROUND,
            round=state_round,
            checkpoint=checkpoint,
            base=fingerprint,
            wire=wire,
            skipped=self.skipped,
            clients=[row.logged() for row in rows],
        )

    def totals(self) -> dict[str, float]:
        """Counts, bytes, and the mean training loss of the updates summed.

        Weighted by examples; those of an update that counts less are discounted as it is.
        """
        counted = [row for row in self.rows if row.outcome is Outcome.OK]
        trained = [row for row in counted if row.has_loss]
        weights = [max(0.0, row.discount) * (row.num_examples or 0) for row in trained]
        examples = sum(weights)
        loss = sum(row.train_loss * weight for row, weight in zip(trained, weights, strict=True))
        return {
            "train_loss": loss / examples if examples else math.nan,
            "clients_ok": len(counted),
            "clients_failed": sum(row.outcome.is_failure for row in self.rows),
            "bytes_down": sum(row.bytes_down or 0 for row in self.rows),
            "bytes_up": sum(row.bytes_up or 0 for row in self.rows),
            "bytes_carried": self.bytes_carried,
            **self.memory_bytes,
            **{key: value for key, value in self.summed.items() if not isinstance(value, str)},
        }

    def exceptions(self) -> dict[str, object]:
        """Why the round was skipped, how many messages were sent again, who was not asked."""
        backing_off = sum(row.outcome is Outcome.BACKING_OFF for row in self.rows)
        values = {"skipped": self.skipped, "resent": self.resent, "backing_off": backing_off}
        values["left_out"] = self.summed.get("left_out", "")
        return {key: value for key, value in values.items() if value}

    def apply_clock(self, clock: Clock, seconds: float) -> dict[str, object]:
        """On a simulated clock: seconds and joules of every row, and the round's own.

        Of what was sent, only what a client had downloaded when it answered or left counts. A late
        row has its seconds already, and the joules are in the row of the round that sent it.
        """
        if not clock.simulated:
            return {}
        for row in self.rows:
            if row.late:
                continue
            spent = clock.spent(row.client_id)
            if spent is not None:
                row.simulated_seconds, row.joules = spent.seconds, spent.joules
            if row.bytes_down:
                row.bytes_down = round(clock.downloaded(row.client_id) * row.bytes_down)
        return {
            "bytes_down": sum(row.bytes_down or 0 for row in self.rows),
            "simulated_seconds": seconds,
            "joules": sum(row.joules for row in self.rows if not math.isnan(row.joules)),
        }


def class_metrics(
    state: State, served: Mapping[str, Adapter], rank_classes: Mapping[str, RankClass]
) -> dict[str, float]:
    """The energy of ``G`` in every rank class's adapter, its effective rank, the server's step.

    ``truncated_energy`` is the energy of ``T_r(G)`` at the class's trained rank: less than
    ``energy_kept`` where a class is also sent what it does not train.
    ``server_learning_rate`` is left out of a round that added no update.
    ``factor_gap`` is ``|mean(sB) mean(A) - mean(sBA)| / |mean(sBA)|``, the mean over modules.
    """
    kept = {f"energy_kept/{k}": state.change.energy_in(adapter) for k, adapter in served.items()}
    gaps = [float(m["factor_gap"]) for m in state.modules.values() if "factor_gap" in m]
    shapes = state.change.shapes
    ranks = {name: rank_class.ranks(shapes) for name, rank_class in rank_classes.items()}
    metrics = {
        "effective_rank": state.change.effective_rank(),
        "dropped_energy": state.dropped_energy,
        **kept,
        **{f"truncated_energy/{k}": state.change.total_energy_kept(r) for k, r in ranks.items()},
    }
    if state.server_learning_rate is not None:
        metrics["server_learning_rate"] = state.server_learning_rate
    return metrics | ({"factor_gap": sum(gaps) / len(gaps)} if gaps else {})


def module_metrics(
    state: State, rank_classes: Mapping[str, RankClass]
) -> dict[str, dict[str, object]]:
    """By module: how ``G`` was decomposed, its rank, energies and singular values.

    ``tail_energy`` is the share above the smallest rank of any class, which rank collapse takes
    first. ``spectrum`` has the singular values at ``SPECTRUM``, by the direction's number.
    """
    shapes = state.change.shapes
    ranks = {k: rank_class.ranks(shapes) for k, rank_class in rank_classes.items()}
    rows: dict[str, dict[str, object]] = {}
    for name, svd in state.change.items():
        kept = {k: energy_kept(svd.S, by_module[name]) for k, by_module in ranks.items()}
        rows[name] = {
            **state.modules.get(name, {}),
            "rank": svd.rank,
            "effective_rank": effective_rank(svd.S),
            "tail_energy": 1.0 - min(kept.values(), default=1.0),
            **{f"energy_kept/{k}": share for k, share in kept.items()},
            "spectrum": _spectrum(svd.S),
        }
    return rows


def _spectrum(S: Tensor) -> dict[str, float]:
    """Four digits of every singular value at ``SPECTRUM``."""
    values = S.tolist()
    return {str(at): float(f"{values[at - 1]:.4g}") for at in SPECTRUM if at <= len(values)}


def memory_metrics(starts: Mapping[str, Start], optim: str) -> dict[str, int]:
    """``memory_bytes/CLASS``: what a client of the class holds beside the base and activations.

    The factors, the gradients and the optimizer's state of the trained ones, carried factors.
    """
    found = {}
    for name, start in starts.items():
        start = start.for_client("")  # what is drawn differs by client, how much of it does not
        held = start.trained.values()
        numbers = sum(getattr(f, part).numel() for f in held for part in start.trainable)
        factors = sum(f.lora_A.numel() + f.lora_B.numel() for f in held)
        trained = FACTOR_BYTES * (factors + numbers) + state_bytes(optim, numbers)
        found[f"memory_bytes/{name}"] = trained + start.carried_bytes
    return found
