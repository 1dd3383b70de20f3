"""``flexlora audit --part membership``: can a run's adapters tell trained rows from held-out ones?

Members are the rows that clients trained on, read from ``clients.csv`` and the plan of their
batches; non-members are held-out rows of the same clients, less those that also occur in training.
A row's score is higher for a likely member:

    loss                 log-probability of the answer under the adapter
    loss against base    the same less that under the base alone (LoRA-Leak, arXiv 2507.18302): how
                         hard a row is for any model cancels
    min-k%++ against base    that difference of Min-K%++ (``token_scores.py``)

Every class's adapter is tested on its clients' rows, the global one on those of all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flexlora.clients.worker import Worker, worker_for
from flexlora.config.resolve import Config, resolved
from flexlora.data.collation import Example
from flexlora.errors import UserError
from flexlora.evaluation.token_scores import row_scores
from flexlora.lora.adapters import Adapter
from flexlora.lora.ranks import RankClass
from flexlora.privacy.membership import Separation, separation
from flexlora.runs.folder import RunFolder
from flexlora.runs.outcomes import Outcome
from flexlora.seeds import numpy_generator
from flexlora.server.strategy import FlexLoRAStrategy
from flexlora.simulations.inspection import check_sources
from flexlora.training.schedule import planned_rows_of

__all__ = ["MembershipRow", "membership_of_run", "print_membership"]

GLOBAL = "global"
SCORES = ("loss", "loss against base", "min-k%++ against base")
HELD_OUT = ("validation", "test")
MOST_ROWS = 2000  # on each side; drawn alike


@dataclass(frozen=True, kw_only=True)
class MembershipRow:
    """How well one score under one adapter separates the rows of its clients."""

    adapter: str
    score: str
    found: Separation

    def to_dict(self) -> dict[str, Any]:
        return {"adapter": self.adapter, "score": self.score, **asdict(self.found)}


def membership_of_run(target: str | Path, *, allow_changed: bool = False) -> list[MembershipRow]:
    """Load the run's base and rows, score them under its adapters as they are now.

    Raises:
        UserError: no run folder, nobody has trained, the data are not at hand or other ones
            (unless ``allow_changed``), or no held-out rows are left.
    """
    run, config = RunFolder.open(target)
    state, classes = run.load_checkpoint()
    if config.privacy.mode == "example":
        raise UserError(
            f"'{run.path}' has privacy.mode=example, where the rows of each step are a secret "
            "of the client: which rows are members is not known."
        )
    # Nothing is trained here, perhaps on another machine than the one that did.
    changes = {"train.optim": "adamw_torch", "model.attn-implementation": "auto"}
    config = resolved(config.with_values(changes))
    worker = _worker(run, config)
    check_sources(
        run.sources(),
        worker.sources(),
        target=str(target),
        model=config.model.name,
        allow_changed=allow_changed,
    )
    trained = _trained_rows(run, worker)
    strategy = FlexLoRAStrategy(config)
    used = {rank_class.name: rank_class for rank_class in classes.values()}
    tested = {GLOBAL: strategy.global_adapter(state)}
    if len(used) > 1:
        tested |= strategy.served(state, _by_rank(used))
    rows = _drawn_rows(worker, trained)
    base = _scores(worker, None, [row.example for row in rows])
    found = []
    for name, adapter in tested.items():
        mine = [k for k, row in enumerate(rows) if name in (GLOBAL, classes[row.client_id].name)]
        if any(rows[k].member for k in mine):
            under = _scores(worker, adapter, [rows[k].example for k in mine])
            found += _separations(name, [rows[k] for k in mine], under, base.of(mine))
    return found


@dataclass(frozen=True, kw_only=True)
class _Row:
    example: Example
    client_id: str
    member: bool


@dataclass(frozen=True, kw_only=True)
class _Scores:
    """Of rows: their answers' mean log-probabilities, and Min-K%++."""

    loglikelihood: Sequence[float]
    lowest: Sequence[float]

    def of(self, rows: Sequence[int]) -> _Scores:
        return _Scores(
            loglikelihood=[self.loglikelihood[k] for k in rows],
            lowest=[self.lowest[k] for k in rows],
        )


def _worker(run: RunFolder, config: Config) -> Worker:
    try:
        return worker_for(config)
    except UserError as error:
        raise UserError(
            f"the rows and the base of '{run.path}' are not at hand: {error} Run this where the "
            "run's data.path and model.name are."
        ) from None


def _by_rank(classes: Mapping[str, RankClass]) -> dict[str, RankClass]:
    return dict(sorted(classes.items(), key=lambda item: (item[1].rank, item[0])))


def _trained_rows(run: RunFolder, worker: Worker) -> dict[str, list[int]]:
    """By client: the train rows in the steps of its updates that were summed, ascending.

    Raises:
        UserError: there is no such update of a client that this data holds.
    """
    known, rows = set(worker.client_ids), dict[str, set[int]]()
    for row in run.client_rows():
        client_id = row["client_id"]
        if row["status"] != Outcome.OK.value or client_id not in known:
            continue
        count = len(worker.data.examples(client_id, "train"))
        plan = planned_rows_of(client_id, int(row["round"]), count, worker.settings)
        rows.setdefault(client_id, set()).update(i for step in plan for i in step)
    if not rows:
        raise UserError(
            f"'{run.path}' has no summed update of a client whose rows are at hand: rows of "
            "deployed clients are on their nodes, and a run without a round has no members."
        )
    return {client_id: sorted(indices) for client_id, indices in rows.items()}


def _drawn_rows(worker: Worker, trained: Mapping[str, Sequence[int]]) -> list[_Row]:
    """At most ``MOST_ROWS`` members, and as many held-out rows of their clients.

    Raises:
        UserError: there are no held-out rows.
    """
    members, others, seen = list[_Row](), list[_Row](), set[tuple[int, ...]]()
    for client_id, indices in trained.items():
        rows = worker.data.examples(client_id, "train")
        members += [_Row(example=rows[i], client_id=client_id, member=True) for i in indices]
        seen |= {rows[i].input_ids for i in indices}
    for client_id in trained:
        held = [row for split in HELD_OUT for row in worker.data.examples(client_id, split)]
        new = [row for row in held if row.input_ids not in seen]
        others += [_Row(example=row, client_id=client_id, member=False) for row in new]
    if not others:
        raise UserError(
            "the clients have no held-out rows to compare with; the data needs a validation or a "
            "test split."
        )
    return [row for rows in (members, others) for row in _drawn(rows, worker.config.seed)]


def _drawn(rows: Sequence[_Row], seed: int) -> list[_Row]:
    if len(rows) <= MOST_ROWS:
        return list(rows)
    chosen = numpy_generator(seed, "membership").choice(len(rows), MOST_ROWS, replace=False)
    return [rows[i] for i in sorted(chosen)]


def _separations(
    name: str, rows: Sequence[_Row], under: _Scores, base: _Scores
) -> list[MembershipRow]:
    """By score; none where a class has no held-out rows."""
    differences = (
        [a - b for a, b in zip(one, other, strict=True)]
        for one, other in (
            (under.loglikelihood, base.loglikelihood),
            (under.lowest, base.lowest),
        )
    )
    found = []
    for score, values in zip(SCORES, (under.loglikelihood, *differences), strict=True):
        members = [v for v, row in zip(values, rows, strict=True) if row.member]
        others = [v for v, row in zip(values, rows, strict=True) if not row.member]
        if others:
            one = separation(members, others)
            found.append(MembershipRow(adapter=name, score=score, found=one))
    return found


def _scores(worker: Worker, adapter: Adapter | None, rows: Sequence[Example]) -> _Scores:
    slots = worker.slots
    slots.load([adapter]) if adapter is not None else slots.clear()
    try:
        likelihood, lowest = row_scores(
            slots,
            rows,
            batch_size=worker.config.eval.batch_size,
            pad_token_id=worker.base.pad_token_id,
        )
    finally:
        slots.clear()
    return _Scores(loglikelihood=likelihood, lowest=lowest)


def print_membership(found: Iterable[MembershipRow], console: Console) -> None:
    """A table of all adapters and scores, and what the figures mean."""
    table = Table(box=None, pad_edge=False)
    for column in ("adapter", "score"):
        table.add_column(column)
    for column in ("rows", "AUC (95 %)", "members found at 1 % false (95 %)"):
        table.add_column(column, justify="right")
    last = ""
    for row in found:
        name, last = ("" if row.adapter == last else row.adapter), row.adapter
        one = row.found
        low, high = one.auc_interval
        area = f"{one.auc:.3f} ({low:.3f} to {high:.3f})"
        low, high = (100 * end for end in one.tpr_interval)
        rate = f"{100 * one.tpr:.1f} % ({low:.1f} to {high:.1f})"
        counts = f"{one.members}+{one.others}" if name else ""
        table.add_row(name, row.score, counts, area, rate)
    console.print(table)
    console.print(
        "Trained rows against held-out rows of the same clients. An AUC of 0.5 and 1 % found are "
        "chance; above them the adapter shows which rows it was trained on.",
        soft_wrap=True,
    )
