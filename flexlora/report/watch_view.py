"""The display of ``flexlora watch``: a picture for a terminal, or a line per round.

Client ids and causes come from clients, so all words are made ``printable``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from flexlora.printable import printable
from flexlora.report.formats import format_metric
from flexlora.report.records import RunRecords, finite
from flexlora.runs.live_state import FINISHED, MEETING, TRAINING, WAITING, LiveState
from flexlora.units import human_bytes, human_seconds

if TYPE_CHECKING:
    from rich.console import RenderableType

    from flexlora.report.snapshots import Snapshot

__all__ = ["frame", "heading", "last_line", "round_line", "sparkline"]

BLOCKS, ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-=+*%#"
SPARK_WIDTH = 20
CELL_WIDTH = 9  # a loss and the gap before it
BAR_WIDTH = 40
LOSSES = "loss in round"
ROUND_WORDS = {"train_loss": "train", "eval_loss": "eval", "bytes_down": "down", "bytes_up": "up"}
ROUND_WORDS |= {"epsilon": "epsilon", "seconds": ""}
OTHER_LINES = 16  # lines of a picture besides those of rank classes
RECENT_ROUNDS = 5  # for the median time of a round


def frame(
    snapshot: Snapshot, width: int, height: int, *, ascii_only: bool = False
) -> RenderableType:
    """The picture of a run, at most ``width`` columns wide."""
    records, live = snapshot.records, snapshot.live
    parts: list[RenderableType] = [
        Text(printable(str(records.path)), style="bold", overflow="fold"),
        Text(_plan(snapshot), overflow="fold"),
        _state_line(snapshot),
    ]
    if snapshot.trouble:
        parts.append(Text(_sentence(snapshot.trouble), style="bold red"))
    parts.append(_bar(records, min(BAR_WIDTH, width), ascii_only=ascii_only))
    if records.rounds:
        room = max(3, height - OTHER_LINES)
        parts += [Text(""), *_losses(records, width, room, ascii_only=ascii_only)]
    if live is not None and not live.ended and live.state != MEETING:
        parts += [Text(""), *_current(live)]
    parts += list(_failures(records))
    if totals := _totals(records):
        parts += [Text(""), Text(totals, overflow="fold")]
    return Group(*parts)


def _bar(records: RunRecords, width: int, *, ascii_only: bool) -> Text:
    """A progress bar of rounds."""
    done = round(width * min(1.0, max(records.last_round, 0) / max(records.num_rounds, 1)))
    full, empty = ("#", ".") if ascii_only else ("━", "┄")
    return Text.assemble((full * done, "green"), (empty * (width - done), "dim"))


def heading(snapshot: Snapshot) -> str:
    """The first line where the output is no terminal."""
    return f"{printable(str(snapshot.records.path))}: {_plan(snapshot)}"


def round_line(snapshot: Snapshot, row: Mapping[str, object]) -> str:
    """``round 3/8  8 clients  train 0.534  eval 0.678  down 10.5 MB  up 2.0 MB  4.1 s``."""
    parts = [f"round {row['round']}/{snapshot.records.num_rounds}"]
    ok, failed = finite(row.get("clients_ok")), finite(row.get("clients_failed"))
    if ok is not None:
        parts.append(f"{ok:.0f} clients" + (f", {failed:.0f} failed" if failed else ""))
    for key, word in ROUND_WORDS.items():
        value = finite(row.get(key))
        if value is not None:
            parts.append(f"{word} {format_metric(key, value)}".strip())
    if row.get("skipped"):
        parts.append(printable(str(row["skipped"])))
    return "  ".join(parts)


def last_line(snapshot: Snapshot) -> str:
    """How the run ended, in a sentence."""
    return _sentence(snapshot.trouble) if snapshot.trouble else f"{_state(snapshot)}."


def _plan(snapshot: Snapshot) -> str:
    """``carried on embedded, 24 clients: rank_2 12, rank_4 6``."""
    records, live = snapshot.records, snapshot.live
    base = str(records.setting("model.name"))
    quantization = str(records.setting("model.quantization"))
    base += "" if quantization == "none" else f" in {quantization}"
    classes: Mapping[str, int] = live.classes if live is not None else {}
    classes = classes or Counter(str(fields.get("name")) for fields in records.classes.values())
    named = ", ".join(f"{name} {count}" for name, count in classes.items())
    clients = f", {sum(classes.values())} clients: {named}" if classes else ""
    out = f"; {live.left_out} left out" if live is not None and live.left_out else ""
    return printable(f"{records.setting('method.name')} on {base}{clients}{out}")


def _state_line(snapshot: Snapshot) -> Text:
    records, live = snapshot.records, snapshot.live
    took = sum(value for _, value in records.points("seconds"))
    going = live is not None and not live.ended and not snapshot.trouble
    if live is not None and going:
        took += max(0.0, _since_round(snapshot, live))
    times = f", {human_seconds(took)} in rounds" if took else ""
    left = _left(snapshot) if going else None
    times += f", about {human_seconds(left)} left" if left is not None else ""
    style = "" if snapshot.trouble else "green" if snapshot.finished else "cyan"
    if live is not None and live.ended and not snapshot.finished:
        style = "bold red"
    return Text(_state(snapshot) + times, style=style, overflow="fold")


def _state(snapshot: Snapshot) -> str:
    """What the run is doing, in words."""
    records, live = snapshot.records, snapshot.live
    of = f"of {records.num_rounds}"
    if live is None or (snapshot.trouble and not live.ended):
        at = f"after round {records.last_round}" if records.last_round >= 0 else "before round 0"
        return f"finished, {at} {of}" if snapshot.finished else f"{at} {of}"
    if live.state == FINISHED:
        return f"finished, round {records.last_round} {of}"
    if live.ended:
        cause = f": {printable(live.cause)}".rstrip(".") if live.cause else ""
        return f"{live.state} after round {records.last_round} {of}{cause}"
    if live.state == MEETING:
        return "meeting the clients"
    if live.state == WAITING:
        return f"round {live.round} {of} is done, choosing clients"
    return f"round {live.round} {of}, {live.state}"


def _since_round(snapshot: Snapshot, live: LiveState) -> float:
    """Seconds since the round in progress began; 0 between rounds."""
    return snapshot.now - live.round_started if live.state not in (WAITING, MEETING) else 0.0


def _left(snapshot: Snapshot) -> float | None:
    """Estimated seconds left, from the median of recent rounds; None before the first."""
    records, live = snapshot.records, snapshot.live
    recent = [seconds for at, seconds in records.points("seconds")[-RECENT_ROUNDS:] if at > 0]
    if not recent or live is None:
        return None
    each = median(recent)
    current = min(each, max(0.0, _since_round(snapshot, live)))
    return max(0.0, (records.num_rounds - records.last_round) * each - current)


def _losses(
    records: RunRecords, width: int, most: int, *, ascii_only: bool
) -> Iterator[RenderableType]:
    """A table of losses: the base, as many of the last rounds as fit, and a sparkline of all."""
    keys = {"training": "train_loss"} if records.points("train_loss") else {}
    keys["held out"] = "eval_loss"
    classes = [name for name in records.rank_classes if records.points(f"eval_loss/{name}")]
    keys |= {name: f"eval_loss/{name}" for name in classes[:most]}
    evaluated = [at for at, _ in records.points("eval_loss")]
    label = max(len(printable(name)) for name in (*keys, LOSSES))
    fits = max(1, (width - label - SPARK_WIDTH - 2) // CELL_WIDTH)
    shown = evaluated if len(evaluated) <= fits else [*evaluated[:1], *evaluated[1 - fits :]]
    shown = shown[-1:] if fits == 1 else shown
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="italic")
    table.add_column(LOSSES, no_wrap=True)
    for at in shown:
        table.add_column("base" if at == 0 else str(at), justify="right", no_wrap=True)
    table.add_column("all rounds", no_wrap=True)
    for name, key in keys.items():
        points = dict(records.points(key))
        cells = [format_metric(key, points.get(at)) for at in shown]
        course = sparkline(list(points.values()), SPARK_WIDTH, ascii_only=ascii_only)
        table.add_row(printable(name), *cells, course)
    yield table
    if len(classes) > most:
        yield Text(f"and {len(classes) - most} more rank classes")


def _current(live: LiveState) -> Iterator[Text]:
    """Counts of the round in progress, the latest failures with causes, the latest replies."""
    what = "evaluated the base" if live.round == 0 else "replied"
    counts = [f"{live.heard} of {live.asked} clients {what}"]
    counts += [f"{live.failed} failed"] if live.failed else []
    counts += [f"{live.resent} messages sent again"] if live.resent else []
    yield Text(f"round {live.round}: {', '.join(counts)}", style="bold")
    if live.cause:
        yield Text(printable(live.cause), style="yellow", overflow="fold")
    for failure in live.failures[-3:]:
        yield _one_line(f"  {failure.client_id}: {failure.cause}", "yellow")
    if live.replied and live.state == TRAINING:
        yield _one_line(f"  replied: {', '.join(reversed(live.replied))}", "dim")


def _failures(records: RunRecords, most: int = 3) -> Iterator[Text]:
    """The last rows of ``clients.csv`` whose update was not accepted."""
    rows = [row for row in records.clients if row["status"] in ("failed", "refused", "left out")]
    if rows:
        yield Text("")
        yield Text(f"Failed, refused or left out so far: {len(rows)}; the last", style="bold")
    for row in rows[-most:]:
        line = f"  round {row['round']}  {row['client_id']}  {row['status']}: {row['cause']}"
        yield _one_line(line, "yellow")


def _totals(records: RunRecords) -> str:
    sent = (("down", records.total("bytes_down")), ("up", records.total("bytes_up")))
    parts = [f"{human_bytes(total)} {word}" for word, total in sent if total is not None]
    sent_again = records.total("resent")
    parts += [f"{sent_again:.0f} messages sent again"] if sent_again else []
    epsilon = records.last("epsilon")
    stated = records.last("as_if_clients")
    whose = f" as if {stated[1]:,.0f} clients" if stated else ""
    parts += [f"epsilon {format_metric('epsilon', epsilon[1])}{whose}"] if epsilon else []
    return ", ".join(parts)


def _one_line(text: str, style: str) -> Text:
    return Text(printable(text), style=style, no_wrap=True, overflow="ellipsis")


def _sentence(text: str) -> str:
    return printable(text[:1].upper() + text[1:]).rstrip(".") + "."


def sparkline(values: Sequence[float], width: int, *, ascii_only: bool = False) -> str:
    """The values in at most ``width`` blocks, each as high as the mean of its part."""
    if not values:
        return ""
    count = min(width, len(values))
    edges = [k * len(values) // count for k in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    blocks = ASCII_BLOCKS if ascii_only else BLOCKS
    scale = (len(blocks) - 1) / (high - low) if high > low else 0.0
    return "".join(blocks[round((value - low) * scale)] for value in means)
