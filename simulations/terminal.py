"""The terminal output of a run: a rank table, a progress bar, a row per round.

Quiet where the output is not a terminal: no bar, and the tables as plain text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from flexlora.data.clients import RowCount
from flexlora.lora.ranks import RankClass
from flexlora.report.formats import format_counts, metric_format
from flexlora.runs.outcomes import Outcome
from flexlora.server.observing.observer import Observer
from flexlora.simulations.engine.canary_clients import OUT
from flexlora.units import human_bytes

if TYPE_CHECKING:
    from flexlora.server.members.roster import Roster

__all__ = ["TerminalObserver"]


class TerminalObserver(Observer):
    """Prints a run to a terminal or a pipe."""

    def __init__(self, console: Console, *, personal_rank: int = 0) -> None:
        self.console, self.personal_rank = console, personal_rank
        self.classes: list[str] = []
        self._causes: list[str] = []
        self._header_done = False
        self.loading = console.status("loading the base and the clients' data")
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.completed:.0f}/{task.total:.0f} clients"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.loading.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.loading.stop()
        self.progress.stop()

    def read(self, layouts: Mapping[str, int]) -> None:
        """Print the keys that rows of other layouts were read from."""
        for keys, count in layouts.items():
            self.console.print(f"{count} rows were read from {keys}.")

    def met(self, roster: Roster) -> None:
        """The rank table: what each class trains, module by module where a cap or pattern bites."""
        self.loading.stop()
        self.progress.start()
        self.classes = list(roster.rank_classes)
        table = Table(title="Rank classes", title_justify="left", box=None, pad_edge=False)
        for column in ("class", "clients", "rows", "trained ranks (modules)", "base", "device"):
            table.add_column(column, justify="right" if column in ("clients", "rows") else "left")
        for name, rank_class in roster.rank_classes.items():
            members = [m for m in roster.members.values() if m.rank_class.name == name]
            spelled = _spelled_ranks(rank_class, roster)
            rows = sum(m.capability.num_examples for m in members)
            bases = format_counts(m.capability.quantization for m in members)
            devices = format_counts(m.capability.device for m in members)
            table.add_row(name, str(len(members)), str(rows), spelled, bases, devices)
        if self.personal_rank:
            spelled = _spelled_ranks(RankClass.of(self.personal_rank), roster)
            rows = sum(m.capability.num_examples for m in roster.members.values())
            table.add_row("personal", str(len(roster.members)), str(rows), spelled, "", "")
        self.console.print(table)
        if roster.coverage:
            self.console.print(f"{roster.coverage}.", soft_wrap=True, markup=False)
        dropped = sum(m.capability.num_dropped for m in roster.members.values())
        if dropped:
            rows = sum(m.capability.num_examples for m in roster.members.values())
            self.console.print(f"{RowCount(examples=rows, dropped=dropped)}.")
        if roster.left_out:
            causes = Counter(cause.split(":")[0] for cause in roster.left_out.values())
            spelled = ", ".join(f"{count} with {cause}" for cause, count in causes.items())
            names = ", ".join(sorted(roster.left_out)[:3])
            more = ", ..." if len(roster.left_out) > 3 else ""
            self.console.print(
                f"{len(roster.left_out)} clients left out: {spelled} ({names}{more})."
            )
        self.console.print()

    def round_started(self, server_round: int, num_rounds: int, num_clients: int) -> None:
        self._causes = []
        if self._task is not None:
            self.progress.remove_task(self._task)
        what = f"round {server_round}/{num_rounds}" if server_round else "evaluating the base"
        self._task = self.progress.add_task(what, total=num_clients)

    def replied(self, client_id: str, outcome: Outcome, cause: str, late: bool) -> None:
        self._advance()
        if cause and outcome is not Outcome.NOT_NEEDED and cause != OUT:
            self._causes.append(f"  {client_id}: {cause}")

    def evaluated(self, client_id: str, cause: str) -> None:
        self._advance()
        if cause:
            self._causes.append(f"  {client_id}: evaluation: {cause}")

    def round_skipped(self, server_round: int, cause: str) -> None:
        self._causes.append(f"  round {server_round}: {cause}")

    def _advance(self) -> None:
        if self._task is not None:
            self.progress.advance(self._task)

    def resent(self, client_id: str, attempt: int, cause: str) -> None:
        self._causes.append(f"  {client_id}: sent again ({attempt}), {cause}")

    def round_finished(self, metrics: Mapping[str, object]) -> None:
        """One line per round under a header that names the rank classes once."""
        columns = [
            ("round", 5),
            ("clients", 9),
            ("train loss", 10),
            ("eval loss", 9),
            *((name, max(8, len(name))) for name in self.classes),
            ("down", 9),
            ("up", 9),
            ("seconds", 8),
        ]
        if not self._header_done:
            self.console.print("Held-out loss per rank class by round", style="italic")
            header = "  ".join(f"{name:>{width}}" for name, width in columns)
            self.console.print(header, style="bold", soft_wrap=True)
            self._header_done = True
        ok, failed = metrics.get("clients_ok"), metrics.get("clients_failed")
        clients = "" if ok is None else f"{ok}" + (f"+{failed}!" if failed else "")
        cells = [
            str(metrics["round"]),
            clients,
            _number(metrics.get("train_loss")),
            _number(metrics.get("eval_loss")),
            *(_number(metrics.get(f"eval_loss/{name}")) for name in self.classes),
            _bytes(metrics.get("bytes_down")),
            _bytes(metrics.get("bytes_up")),
            f"{metrics['seconds']:.1f}",
        ]
        line = "  ".join(f"{c:>{w}}" for c, (_, w) in zip(cells, columns, strict=True))
        self.console.print(line + _out_there(metrics) + _spent(metrics), soft_wrap=True)
        if "left_out" in metrics:
            self._causes.append(f"  {metrics['left_out']}")
        if "budget_spent" in metrics:
            self._causes.append(f"  the last round: {metrics['budget_spent']}")
        for cause in self._causes:
            self.console.print(cause, style="yellow", soft_wrap=True, markup=False)

    def summary(self, rows: list[dict]) -> None:
        """Base against the last round, per rank class."""
        evaluated = [row for row in rows if row.get("eval_loss") is not None]
        if not evaluated or not self.classes:
            return
        first, last = evaluated[0], evaluated[-1]
        scores = [("eval_loss", "loss"), ("eval_exact_match", "exact match")]
        scores = [(k, n) for k, n in scores if first.get(k) is not None and last.get(k) is not None]
        table = Table(
            title=f"Held-out rows: base, and after round {last['round']}",
            title_justify="left",
            box=None,
            pad_edge=False,
        )
        table.add_column("class")
        for _, name in scores:
            table.add_column(f"{name}: base", justify="right")
            table.add_column(f"after {last['round']}", justify="right")
        table.add_column("energy kept", justify="right")
        for name in self.classes:
            cells = []
            for key, _ in scores:
                cells += [_number(row.get(f"{key}/{name}")) for row in (first, last)]
            kept = last.get(f"energy_kept/{name}")
            table.add_row(name, *cells, "" if kept is None else f"{100 * kept:.1f} %")
        self.console.print()
        self.console.print(table)
        self._personal_summary(last, scores)

    def _personal_summary(self, last: Mapping[str, object], scores: list[tuple[str, str]]) -> None:
        """The same clients' own rows with and without the factors that they keep to themselves."""
        if "eval_loss/personal" not in last:
            return
        clients = last["personal_clients"]
        title = f"With the factors that never leave their {clients} clients, on their own rows"
        table = Table(box=None, pad_edge=False)
        table.add_column("model")
        for _, name in scores:
            table.add_column(name, justify="right")
        for row, name in (("global", "global_of_personal"), ("with its own factors", "personal")):
            table.add_row(row, *(_number(last.get(f"{key}/{name}")) for key, _ in scores))
        self.console.print()
        self.console.print(title, style="italic", soft_wrap=True)
        self.console.print(table)


def _spelled_ranks(rank_class: RankClass, roster: Roster) -> str:
    """``4 (24), 2 (4)``: each rank after the caps, and how many modules have it."""
    ranks = Counter(rank_class.ranks(roster.shapes).values())
    return ", ".join(f"{rank} ({count})" for rank, count in sorted(ranks.items()))


def _out_there(metrics: Mapping[str, object]) -> str:
    """Seconds and joules of the round in the simulated world, where there is one."""
    found = [(key, metrics.get(key)) for key in ("simulated_seconds", "joules")]
    spelled = [metric_format(key)(value) for key, value in found if isinstance(value, int | float)]
    return f"  out there {', '.join(spelled)}" if spelled else ""


def _spent(metrics: Mapping[str, object]) -> str:
    epsilon, stated = metrics.get("epsilon"), metrics.get("as_if_clients")
    whose = f" as if {stated:,} clients" if stated else ""
    return f"  epsilon {epsilon:.3g}{whose}" if isinstance(epsilon, float) else ""


def _number(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) and value == value else ""


def _bytes(value: object) -> str:
    return human_bytes(value) if isinstance(value, int | float) else ""
