"""What it took to reach a loss: rounds, bytes and time, in one run and between runs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from flexlora.report.formats import format_metric
from flexlora.report.markup import Markup, data, name, table, text
from flexlora.report.records import RunRecords

__all__ = ["reached", "shared_targets", "so_far", "targets_table"]

SHARES = (0.5, 0.8, 0.9, 0.95, 1.0)  # of the way from the base's loss to the best one
BYTES = ("bytes_down", "bytes_up")
COSTS = (
    ("bytes, down and up", BYTES),
    ("simulated time", ("simulated_seconds",)),
    ("time here", ("seconds",)),
)
LOSS = "eval_loss"


def so_far(run: RunRecords, keys: Sequence[str]) -> dict[int, float]:
    """The cumulative sum of ``keys`` by round."""
    spent: dict[int, float] = {}
    for key in keys:
        for at, value in run.points(key):
            spent[at] = spent.get(at, 0.0) + value
    return dict(zip(spent, accumulate(spent.values()), strict=True))


def reached(run: RunRecords, loss: float) -> int | None:
    """The first evaluated round of training with this loss or a lower one."""
    rounds = (at for at, value in run.points(LOSS) if at > 0 and value <= loss)
    return next(rounds, None)


def _best(run: RunRecords) -> float | None:
    return min((value for at, value in run.points(LOSS) if at > 0), default=None)


def _costs(runs: Sequence[RunRecords]) -> list[tuple[str, Sequence[str]]]:
    return [(title, keys) for title, keys in COSTS if any(so_far(run, keys) for run in runs)]


def _cost_cells(
    run: RunRecords, at: int | None, costs: Sequence[tuple[str, Sequence[str]]]
) -> list[Markup]:
    cells = [data(at, str(at)) if at is not None else text("not reached")]
    for _, keys in costs:
        spent = so_far(run, keys).get(at) if at is not None else None
        cells.append(data(spent, format_metric(keys[0], spent), derived=True))
    return cells


def targets_table(run: RunRecords) -> Markup:
    """A row per share of the improvement; empty where the loss has not fallen."""
    base, best = run.base(LOSS), _best(run)
    if base is None or best is None or best >= base[1]:
        return Markup("")
    costs = _costs([run])
    rows = []
    for share in SHARES:
        target = base[1] + share * (best - base[1]) if share < 1 else best
        said = text(f"{100 * share:.0f} % of the way" if share < 1 else "the best")
        shown = data(target, format_metric(LOSS, target), derived=True)
        rows.append([said, shown, *_cost_cells(run, reached(run, target), costs)])
    header = ["target", "loss", "round", *(title for title, _ in costs)]
    return table(header, rows, caption="First round at a loss, and what it took until then")


def shared_targets(runs: Sequence[RunRecords], names: Sequence[str]) -> tuple[float, Markup] | None:
    """``(loss, table)`` of the lowest loss that every run has reached; None where one has none."""
    bests = [_best(run) for run in runs]
    if any(best is None for best in bests):
        return None
    target = max(best for best in bests if best is not None)
    costs = _costs(runs)
    rows = [
        [name(run_name), *_cost_cells(run, reached(run, target), costs)]
        for run, run_name in zip(runs, names, strict=True)
    ]
    header = ["run", "round", *(title for title, _ in costs)]
    return target, table(header, rows, caption="What each run took to the same loss")
