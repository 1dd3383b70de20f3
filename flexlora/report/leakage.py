"""The canaries of a run as a table: epsilon at least, an estimate, epsilon at most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from flexlora.config.resolve import Config
from flexlora.errors import UserError
from flexlora.privacy.canary_audit import CanaryFigures, audit_canaries
from flexlora.privacy.ledger import Ledger
from flexlora.privacy.one_run import CONFIDENCE
from flexlora.runs.canary_file import CanaryRecord
from flexlora.runs.folder import RunFolder

__all__ = ["CanaryReport", "canary_report", "print_canaries"]

HOW = (
    "canaries are put into a run before it starts: `flexlora simulate --set audit.canaries=200 ...`"
)


@dataclass(frozen=True, kw_only=True)
class CanaryReport:
    """``figures`` of all canaries and of each rank class; ``upper`` is the accountant's epsilon.

    ``upper`` is NaN where no noise is accounted, ``planned`` the rounds that the run was to have.
    """

    rounds: int
    planned: int
    norm: float
    delta: float
    upper: float
    figures: Sequence[CanaryFigures]

    @property
    def refuted(self) -> bool:
        """Whether the lower bound over all canaries is above the accountant's epsilon."""
        return self.figures[0].lower.epsilon > self.upper

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN and no infinity: None in their place."""

        def plain(value: object) -> object:
            if isinstance(value, dict):
                return {key: plain(item) for key, item in value.items()}
            if isinstance(value, list | tuple):
                return [plain(item) for item in value]
            return None if isinstance(value, float) and not math.isfinite(value) else value

        found = plain({**asdict(self), "confidence": CONFIDENCE, "refuted": self.refuted})
        assert isinstance(found, dict)
        return found


def canary_report(run: RunFolder, config: Config, delta: float | None = None) -> CanaryReport:
    """Audit the canaries of the run's rounds so far; ``delta`` is that of the run by default.

    Raises:
        UserError: a run without canaries or without a round, a delta other than the ledger's.
    """
    record = CanaryRecord.read(run.path)
    if record is None:
        raise UserError(f"'{run.path}' has no canaries: {HOW}.")
    state, _ = run.load_checkpoint()
    record = record.until(state.round)
    if not record.rounds:
        raise UserError(
            f"'{run.path}' has no round of training yet, so its canaries have no scores; resume it."
        )
    stored = run.load_notes().get("privacy", {}).get("ledger")
    ledger = Ledger.from_dict(stored) if stored else None
    if ledger is not None and delta not in (None, ledger.delta):
        raise UserError(
            f"--delta is {delta:g}, the run's ledger is kept at {ledger.delta:g}: a lower bound at "
            "one delta says nothing of an upper bound at another. Leave --delta out."
        )
    delta = ledger.delta if ledger else (config.privacy.delta if delta is None else delta)
    if not 0 <= delta < 1:
        raise UserError(f"--delta is {delta:g}, expected at least 0 and less than 1.")
    rows = [record.rounds[at] for at in sorted(record.rounds)]
    figures = audit_canaries(
        [scores for _, scores in rows],
        [weight for weight, _ in rows],
        record.share,
        included=record.included,
        classes=list(record.classes.values()),
        delta=delta,
    )
    return CanaryReport(
        rounds=len(rows),
        planned=config.num_server_rounds,
        norm=record.canaries.norm,
        delta=delta,
        upper=ledger.epsilon if ledger else math.nan,
        figures=figures,
    )


def print_canaries(found: CanaryReport, console: Console) -> None:
    """The table, and one sentence on what it means."""
    everyone = found.figures[0]
    console.print(
        f"{everyone.canaries} canaries, {everyone.included} of them in, norm {found.norm:g}, "
        f"{found.rounds} rounds, delta {found.delta:g}",
        style="italic",
        soft_wrap=True,
    )
    if found.rounds < found.planned:
        console.print(f"The run has {found.rounds} of its {found.planned} rounds.", soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    table.add_column("canaries of")
    for column in ("in/all", "AUC", "guesses right", "epsilon at least", "estimate", "at most"):
        table.add_column(column, justify="right")
    for row in found.figures:
        upper = "" if row is not everyone else _upper(found.upper)
        guesses = f"{row.lower.correct}/{row.lower.guesses}" if row.lower.guesses else ""
        area = "" if math.isnan(row.auc) else f"{row.auc:.3f}"
        estimate = "" if math.isnan(row.estimate) else f"{row.estimate:.3g}"
        counts = f"{row.included}/{row.canaries}"
        least = f"{row.lower.epsilon:.3g}"
        table.add_row(row.name, counts, area, guesses, least, estimate, upper)
    console.print(table)
    console.print(_meaning(found), soft_wrap=True)


def _upper(upper: float) -> str:
    return "no noise" if math.isnan(upper) else f"{upper:.3g}"


def _meaning(found: CanaryReport) -> str:
    least, share = found.figures[0].lower.epsilon, f"{100 * CONFIDENCE:g} %"
    if found.refuted:
        return (
            f"With {share} confidence epsilon is at least {least:.3g}, above the accountant's "
            f"{found.upper:.3g}: the run is not as private as it says. Please report it."
        )
    if math.isnan(found.upper):
        bound = "No noise was added, so no epsilon bounds it from above."
    else:
        bound = f"The accountant proves at most {found.upper:.3g}."
    if least == 0.0:
        return (
            f"These canaries refute no epsilon. That is no proof of privacy: more of them, or "
            f"another attack, may. {bound}"
        )
    return (
        f"With {share} confidence whoever sees every round's global change can tell whether a "
        f"client took part: epsilon is at least {least:.3g}. {bound}"
    )
