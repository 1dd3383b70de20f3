"""What a rank class is and costs: the columns in which classes differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flexlora.report.formats import format_counts, format_metric
from flexlora.report.markup import Markup, data, element, joined, name, table, text
from flexlora.report.participants import Participant, participants
from flexlora.report.records import RunRecords, cell_number

__all__ = ["classes_table", "served_alike"]

ALIKE = 1e-4  # relative: one adapter split into other factors scores equal up to rounding


def served_alike(run: RunRecords, keys: Sequence[str]) -> bool:
    """Whether several classes have equal scores under ``keys`` at the end: one adapter for all."""
    if len(run.rank_classes) < 2:
        return False
    for key in keys:
        ends = [run.last(f"{key}/{rank_class}") for rank_class in run.rank_classes]
        values = [end[1] for end in ends if end is not None]
        if len(values) < len(ends) or max(values) - min(values) > ALIKE * abs(max(values)):
            return False
    return bool(keys)


def classes_table(run: RunRecords) -> Markup:
    """A row per rank class: who is in it, what a training moves and holds, what its rank is worth.

    The number of clients is the checkpoint's; the other columns are of clients that have trained.
    """
    everybody = participants(run)
    trained: dict[str, list[Mapping[str, str]]] = {}
    for row in run.clients:
        if row["rank_class"]:
            trained.setdefault(row["rank_class"], []).append(row)
    columns: dict[str, list[Markup]] = {}
    for rank_class in run.rank_classes:
        members = [client for client in everybody if client.rank_class == rank_class]
        cells = _members(members, trained.get(rank_class, ()))
        for title, cell in (cells | _costs(run, rank_class, trained.get(rank_class, ()))).items():
            columns.setdefault(title, []).append(cell)
    shown = {title: cells for title, cells in columns.items() if any(cells)}
    rows = [
        [text(rank_class), *(cells[at] for cells in shown.values())]
        for at, rank_class in enumerate(run.rank_classes)
    ]
    header, words = ["rank class", *shown], 1 + sum(title in WORDS for title in shown)
    whole = table(header, rows, words=words, caption="Rank classes")
    return joined([whole, _meaning(run, shown)])


WORDS = ("trained rank", "base")
ALONE, LOSS_ALONE, MEMORY = "energy of T_r alone", "loss of T_r alone", "memory of a training"


def _members(
    members: Sequence[Participant], rows: Sequence[Mapping[str, str]]
) -> dict[str, Markup]:
    last = {row["client_id"]: row for row in rows}
    columns = {"trained rank": "rank", "base": "quantization"}
    counts = {
        "clients": len(members),
        "trained so far": sum(client.asked > 0 for client in members),
        "their train rows": sum(client.rows for client in members),
    }
    return {
        **{t: name(format_counts(row[k] for row in last.values())) for t, k in columns.items()},
        **{title: data(count, f"{count:,}", derived=True) for title, count in counts.items()},
    }


def _costs(
    run: RunRecords, rank_class: str, rows: Sequence[Mapping[str, str]]
) -> dict[str, Markup]:
    """Mean bytes of a counted training, bytes in memory, and ``T_r(G)`` without what is carried."""
    counted = [row for row in rows if row["status"] == "ok"]
    cells = {}
    for key in ("bytes_down", "bytes_up"):
        numbers = [n for row in counted if (n := cell_number(row.get(key, ""))) is not None]
        mean = sum(numbers) / len(numbers) if numbers else None
        title = f"{key.removeprefix('bytes_')} a training"
        cells[title] = data(mean, format_metric("bytes", mean), derived=True)
    for title, key in ((MEMORY, "memory_bytes"), (ALONE, "truncated_energy")):
        end = run.last(f"{key}/{rank_class}")
        cells[title] = data(end[1], format_metric(key, end[1])) if end else Markup("")
    losses = run.samples.losses if run.samples is not None else {}
    pair = losses.get(rank_class)
    alone, served = (pair.truncated, pair.served) if pair is not None else (None, None)
    cells[LOSS_ALONE] = data(alone, format_metric("eval_loss", alone))
    cells["as served"] = data(served, format_metric("eval_loss", served))
    return cells


def _meaning(run: RunRecords, shown: Mapping[str, object]) -> Markup:
    """What the last columns are, where they are there."""
    parts = []
    if MEMORY in shown:
        parts.append(
            "Memory: factors, gradients and optimizer state, carried factors; the base and its "
            "activations, equal for all, come on top."
        )
    if LOSS_ALONE in shown and run.samples is not None:
        rows, at = f"{run.samples.rows:,}", run.samples.round
        parts.append(
            f"T_r alone: a client's trained rank cut out of G, without what it carries; both "
            f"losses are on the same {rows} {run.samples.split} rows after round {at}."
        )
    elif ALONE in shown:
        parts.append("T_r alone: a client's trained rank cut out of G.")
    return element("p", text(" ".join(parts)), class_="note") if parts else Markup("")
