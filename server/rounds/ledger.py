"""What a round has to say for itself: the sums behind ``metrics.jsonl`` and the two tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from flexlora.aggregation.engine.state import State, effective_rank
from flexlora.algebra.linalg import energy_kept
from flexlora.lora.adapters import Adapter
from flexlora.lora.ranks import RankClass
from flexlora.server.members.roster import Member, Roster
from flexlora.server.members.sampling import History
from flexlora.server.transport.clocks import Clock, Spent
from flexlora.wire.jobs import PERSONAL, EvalResult, Score, TrainResult

__all__ = [
    "RoundLedger",
    "class_metrics",
    "eval_metrics",
    "evaluation_rows",
    "left_out_rows",
    "module_metrics",
]

ALIKE_SECONDS = 1.0  # of every training where nobody's time is told: nobody is slow


@dataclass(kw_only=True)
class RoundLedger:
    """The clients of one round: a row each, and what their replies add up to.

    ``measured`` says that clients train on machines of their own, so that the seconds they report
    are theirs. Where one process trains for all, they are its own, other ones in every run.
    """

    server_round: int
    measured: bool = True
    rows: list[dict[str, object]] = field(default_factory=list)
    bytes_down: int = 0
    bytes_up: int = 0
    bytes_carried: int = 0
    resent: int = 0
    skipped: str = ""

    def record(
        self,
        member: Member,
        *,
        bytes_down: int,
        bytes_up: int,
        result: TrainResult | None,
        status: str,
        cause: str = "",
    ) -> None:
        """One client's row of ``clients.csv``; a refused or failed one says why."""
        self.bytes_up += bytes_up
        row: dict[str, object] = {
            "round": self.server_round,
            "client_id": member.capability.client_id,
            "rank_class": member.rank_class.name,
            "rank": member.rank_class.rank,
            "quantization": member.capability.quantization,
            "device": member.capability.device,
            "num_examples": member.capability.num_examples,
            "bytes_down": bytes_down,
            "bytes_up": bytes_up,
            "status": status,
            "cause": cause,
        }
        if result is not None:
            row |= {
                "num_examples": result.num_examples,
                "loss_before": result.loss_before,
                "loss_after": result.loss_after,
                "train_loss": result.train_loss,
                "seconds": result.train_seconds,
            }
        self.rows.append(row)

    def came_late(self, spent: Spent | None) -> None:
        """The last row is of an earlier round's message, whose joules that round has counted."""
        seconds = {"simulated_seconds": spent.seconds} if spent is not None else {}
        self.rows[-1] |= {"late": True, **seconds}

    def teach(self, history: History) -> None:
        """What sampling remembers of who counted; of two updates the one that was asked for now."""
        counted = [row for row in self.rows if row["status"] == "ok"]
        for row in sorted(counted, key=lambda row: "late" not in row):
            took = row["seconds"] if self.measured else row.get("simulated_seconds", ALIKE_SECONDS)
            history.learn(row["client_id"], self.server_round, row["train_loss"], took)

    def sit_out(self, roster: Roster, causes: Mapping[str, str]) -> None:
        """The clients that could be reached and are not asked, as their messages were lost."""
        for client_id, cause in causes.items():
            member = roster.members[client_id]
            self.record(
                member, bytes_down=0, bytes_up=0, result=None, status="backing off", cause=cause
            )

    def leave_out(self, causes: Mapping[str, str]) -> None:
        """The nodes that came later and cannot take part."""
        self.rows += _left_out(self.server_round, causes)

    def metrics(self) -> dict[str, object]:
        """Counts, bytes, and the mean training loss weighted by examples, over those that count."""
        counted = [row for row in self.rows if row["status"] == "ok"]
        examples = sum(int(row["num_examples"]) for row in counted)
        loss = sum(float(row["train_loss"]) * int(row["num_examples"]) for row in counted)
        return {
            "train_loss": loss / examples if examples else math.nan,
            "clients_ok": len(counted),
            "clients_failed": sum(row["status"] in ("failed", "refused") for row in self.rows),
            "bytes_down": self.bytes_down,
            "bytes_up": self.bytes_up,
            "bytes_carried": self.bytes_carried,
        }

    def account(self, clock: Clock, seconds: float) -> dict[str, object]:
        """What the round took on a simulated clock, and each client of it; why it was skipped."""
        told: dict[str, object] = {"skipped": self.skipped} if self.skipped else {}
        resting = sum(row["status"] == "backing off" for row in self.rows)
        told |= {"resent": self.resent} if self.resent else {}
        told |= {"backing_off": resting} if resting else {}
        if not clock.simulated:
            return told
        for row in self.rows:
            if "late" not in row:
                self._as_it_went(row, clock)
        joules = sum(float(row.get("joules", 0.0)) for row in self.rows)
        told |= {"bytes_down": sum(int(row.get("bytes_down", 0)) for row in self.rows)}
        return {**told, "simulated_seconds": seconds, "joules": joules}

    def _as_it_went(self, row: dict, clock: Clock) -> None:
        """Seconds, joules, and of what was sent the share that had come before the client left."""
        client_id = str(row["client_id"])
        spent = clock.spent(client_id)
        if spent is not None:
            row |= {"simulated_seconds": spent.seconds, "joules": spent.joules}
        if row.get("bytes_down"):
            row["bytes_down"] = round(clock.downloaded(client_id) * row["bytes_down"])


def left_out_rows(roster: Roster) -> list[dict[str, object]]:
    """The clients that take no part at all, as rows of round 0."""
    return _left_out(0, roster.left_out)


def _left_out(server_round: int, causes: Mapping[str, str]) -> list[dict[str, object]]:
    row = {"round": server_round, "status": "left out"}
    return [{**row, "client_id": name, "cause": cause} for name, cause in sorted(causes.items())]


def class_metrics(state: State, served: Mapping[str, Adapter]) -> dict[str, float]:
    """What every rank class is given of ``G``, how many directions ``G`` uses, and its health.

    ``factor_gap`` is ``|mean(sB) mean(A) - mean(sBA)| / |mean(sBA)|``, the mean over modules.
    """
    kept = {f"energy_kept/{k}": state.change.energy_in(adapter) for k, adapter in served.items()}
    gaps = [float(m["factor_gap"]) for m in state.modules.values() if "factor_gap" in m]
    metrics = {
        "effective_rank": state.change.effective_rank(),
        "dropped_energy": state.dropped_energy,
        **kept,
    }
    return metrics | ({"factor_gap": sum(gaps) / len(gaps)} if gaps else {})


def module_metrics(
    state: State, rank_classes: Mapping[str, RankClass]
) -> dict[str, dict[str, float | str]]:
    """The same module by module: how it was decomposed, and where its energy is.

    ``tail_energy`` is the share above the smallest rank that any class has: what rank collapse
    eats first.
    """
    shapes = state.change.shapes
    ranks = {k: rank_class.ranks(shapes) for k, rank_class in rank_classes.items()}
    rows = {}
    for name, svd in state.change.items():
        kept = {k: energy_kept(svd.S, own[name]) for k, own in ranks.items()}
        rows[name] = {
            **state.modules.get(name, {}),
            "rank": svd.rank,
            "effective_rank": effective_rank(svd.S),
            "tail_energy": 1.0 - min(kept.values(), default=1.0),
            **{f"energy_kept/{k}": share for k, share in kept.items()},
        }
    return rows


def eval_metrics(results: Sequence[EvalResult], roster: Roster, *, base: str) -> dict[str, float]:
    """Loss, exact match and ROUGE-L per rank class over all rows, and over clients at their own.

    ``eval_loss`` is what the clients see: each one's rows under its own class's adapter.
    ``eval_loss/CLASS`` is that class's adapter on the rows of all evaluating clients. Where clients
    keep factors to themselves, ``eval_loss/personal`` is with them, and
    ``eval_loss/global_of_personal`` each one's class's adapter alone on the same clients' rows.
    """
    per_class = dict.fromkeys(roster.rank_classes, Score())
    own, personal, without = Score(), Score(), Score()
    keepers = 0
    for result in results:
        if result.client_id not in roster.members or not result.scores:
            continue
        everywhere = result.scores.get(base)
        for name in per_class:
            per_class[name] += everywhere or result.scores.get(name, Score())
        own_class = roster.members[result.client_id].rank_class.name
        served = everywhere or result.scores.get(own_class, Score())
        own += served
        if PERSONAL in result.scores and served.rows:
            keepers += 1
            personal += result.scores[PERSONAL]
            without += served
    named = {PERSONAL: personal, f"global_of_{PERSONAL}": without} if keepers else {}
    metrics = dict(_means("", own))
    for name, score in (per_class | named).items():
        metrics |= dict(_means(f"/{name}", score))
    return metrics | ({"personal_clients": keepers} if keepers else {})


def _means(suffix: str, score: Score) -> list[tuple[str, float]]:
    if not score.tokens:
        return []
    means = [(f"eval_loss{suffix}", score.loss / score.tokens)]
    if score.generated:
        means += [
            (f"eval_exact_match{suffix}", score.exact_match / score.generated),
            (f"eval_rouge_l{suffix}", score.rouge_l / score.generated),
        ]
    return means


def evaluation_rows(server_round: int, results: Sequence[EvalResult]) -> list[dict[str, object]]:
    """One row per client and rank class for ``evaluation.csv``."""
    rows = []
    for result in sorted(results, key=lambda r: r.client_id):
        for name, score in result.scores.items():
            row = {"round": server_round, "client_id": result.client_id, "rank_class": name}
            rows.append(row | dict(_means("", score)) | {"rows": score.rows})
    return rows
