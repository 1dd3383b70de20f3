"""What ``flexlora watch`` shows: a picture for a terminal of any width, or a line per round.

Client ids and causes are texts of other people's: what does not print is left out, so that no
client can send commands to the terminal.
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

from flexlora.report.records import RunRecords, finite
from flexlora.report.words import spelled, with_prefix
from flexlora.runs.live_state import FINISHED, MEETING, TRAINING, WAITING, LiveState

if TYPE_CHECKING:
    from rich.console import RenderableType

    from flexlora.report.watch_sight import Sight

__all__ = ["duration", "frame", "heading", "last_word", "round_line", "sparkline"]

BLOCKS, ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-=+*%#"
SPARK_WIDTH = 20
CELL_WIDTH = 9  # a loss and the gap before it
BAR_WIDTH = 40
LOSSES = "loss in round"
OTHER_LINES = 16  # of a picture beside the rank classes
RECENT_ROUNDS = 5  # whose median says how long a round takes


def frame(sight: Sight, width: int, height: int, *, ascii_only: bool = False) -> RenderableType:
    """The run at one moment; nothing in it is wider than ``width``."""
    records, live = sight.records, sight.live
    parts: list[RenderableType] = [
        Text(_safe(str(records.path)), style="bold", overflow="fold"),
        Text(_plan(sight), overflow="fold"),
        _state_line(sight),
    ]
    if sight.trouble:
        parts.append(Text(_sentence(sight.trouble), style="bold red"))
    parts.append(_bar(records, min(BAR_WIDTH, width), ascii_only=ascii_only))
    if records.rounds:
        room = max(3, height - OTHER_LINES)
        parts += [Text(""), *_losses(records, width, room, ascii_only=ascii_only)]
    if live is not None and not live.ended and live.state != MEETING:
        parts += [Text(""), *_current(live)]
    parts += list(_failures(records))
    totals = _totals(records, live)
    if totals:
        parts += [Text(""), Text(totals, overflow="fold")]
    return Group(*parts)


def _bar(records: RunRecords, width: int, *, ascii_only: bool) -> Text:
    """The share of the rounds that are done."""
    done = round(width * min(1.0, max(records.last_round, 0) / max(records.num_rounds, 1)))
    full, empty = ("#", ".") if ascii_only else ("━", "┄")
    return Text.assemble((full * done, "green"), (empty * (width - done), "dim"))


def heading(sight: Sight) -> str:
    """The first line where the output is no terminal."""
    return f"{_safe(str(sight.records.path))}: {_plan(sight)}"


def round_line(sight: Sight, row: Mapping[str, object]) -> str:
    """``round 3/8  8 clients  train 0.534  eval 0.678  down 10.5 MB  up 2.0 MB  4.1 s``."""
    parts = [f"round {row['round']}/{sight.records.num_rounds}"]
    ok, failed = finite(row.get("clients_ok")), finite(row.get("clients_failed"))
    if ok is not None:
        parts.append(f"{ok:.0f} clients" + (f", {failed:.0f} failed" if failed else ""))
    for key, word in (
        ("train_loss", "train"),
        ("eval_loss", "eval"),
        ("bytes_down", "down"),
        ("bytes_up", "up"),
        ("epsilon", "epsilon"),
        ("seconds", ""),
    ):
        value = finite(row.get(key))
        if value is not None:
            parts.append(f"{word} {spelled(key, value)}".strip())
    if row.get("skipped"):
        parts.append(_safe(str(row["skipped"])))
    return "  ".join(parts)


def last_word(sight: Sight) -> str:
    """How it ended."""
    return _sentence(sight.trouble) if sight.trouble else f"{_state(sight)}."


def _plan(sight: Sight) -> str:
    """``carried on embedded, 24 clients: rank_2 12, rank_4 6``."""
    records, live = sight.records, sight.live
    base, held = str(records.setting("model.name")), str(records.setting("model.quantization"))
    held = "" if held == "none" else f" in {held}"
    classes: Mapping[str, int] = live.classes if live is not None else {}
    classes = classes or Counter(str(own.get("name")) for own in records.classes.values())
    named = ", ".join(f"{name} {count}" for name, count in classes.items())
    clients = f", {sum(classes.values())} clients: {named}" if classes else ""
    out = f"; {live.left_out} left out" if live is not None and live.left_out else ""
    return _safe(f"{records.setting('method.name')} on {base}{held}{clients}{out}")


def _state_line(sight: Sight) -> Text:
    records, live = sight.records, sight.live
    took = sum(value for _, value in records.points("seconds"))
    going = live is not None and not live.ended and not sight.trouble
    if live is not None and going:
        took += max(0.0, _since_round(sight, live))
    times = f", {duration(took)} in rounds" if took else ""
    left = _left(sight) if going else None
    times += f", about {duration(left)} left" if left is not None else ""
    style = {True: "green", False: "cyan"}[sight.finished] if not sight.trouble else ""
    failed = live is not None and live.ended and not sight.finished
    return Text(_state(sight) + times, style="bold red" if failed else style, overflow="fold")


def _state(sight: Sight) -> str:
    """Where the run is, in words."""
    records, live = sight.records, sight.live
    of = f"of {records.num_rounds}"
    if live is None or (sight.trouble and not live.ended):
        at = f"after round {records.last_round}" if records.last_round >= 0 else "before round 0"
        return f"finished, {at} {of}" if sight.finished else f"{at} {of}"
    if live.state == FINISHED:
        return f"finished, round {records.last_round} {of}"
    if live.ended:
        cause = f": {_safe(live.cause)}".rstrip(".") if live.cause else ""
        return f"{live.state} after round {records.last_round} {of}{cause}"
    if live.state == MEETING:
        return "meeting the clients"
    if live.state == WAITING:
        return f"round {live.round} {of} is done, choosing clients"
    return f"round {live.round} {of}, {live.state}"


def _since_round(sight: Sight, live: LiveState) -> float:
    """Seconds of the round in progress, by the server's clock and ours."""
    return sight.now - live.round_started if live.state not in (WAITING, MEETING) else 0.0


def _left(sight: Sight) -> float | None:
    """Seconds to the end, from the last rounds' median; None before the first one is done."""
    records, live = sight.records, sight.live
    recent = [seconds for at, seconds in records.points("seconds")[-RECENT_ROUNDS:] if at > 0]
    if not recent or live is None:
        return None
    each = median(recent)
    current = min(each, max(0.0, _since_round(sight, live)))
    return max(0.0, (records.num_rounds - records.last_round) * each - current)


def _losses(
    records: RunRecords, width: int, most: int, *, ascii_only: bool
) -> Iterator[RenderableType]:
    """Held-out loss by rank class: the base, as many of the last rounds as fit, and the course."""
    keys = {"training": "train_loss"} if records.points("train_loss") else {}
    keys["held out"] = "eval_loss"
    classes = [name for name in records.rank_classes if records.points(f"eval_loss/{name}")]
    keys |= {name: f"eval_loss/{name}" for name in classes[:most]}
    evaluated = [at for at, _ in records.points("eval_loss")]
    label = max(len(_safe(name)) for name in (*keys, LOSSES))
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
        cells = [spelled(key, points.get(at)) for at in shown]
        course = sparkline(list(points.values()), SPARK_WIDTH, ascii_only=ascii_only)
        table.add_row(_safe(name), *cells, course)
    yield table
    if len(classes) > most:
        yield Text(f"and {len(classes) - most} more rank classes")


def _current(live: LiveState) -> Iterator[Text]:
    """Who replied in this round so far, and who did not and why."""
    what = "evaluated the base" if live.round == 0 else "replied"
    counts = [f"{live.heard} of {live.asked} clients {what}"]
    counts += [f"{live.failed} failed"] if live.failed else []
    counts += [f"{live.resent} messages sent again"] if live.resent else []
    yield Text(f"round {live.round}: {', '.join(counts)}", style="bold")
    if live.cause:
        yield Text(_safe(live.cause), style="yellow", overflow="fold")
    for failure in live.failures[-3:]:
        yield _one_line(f"  {failure.client_id}: {failure.cause}", "yellow")
    if live.replied and live.state == TRAINING:
        yield _one_line(f"  replied: {', '.join(reversed(live.replied))}", "dim")


def _failures(records: RunRecords, most: int = 3) -> Iterator[Text]:
    """The last rows of ``clients.csv`` that do not count."""
    rows = [row for row in records.clients if row["status"] in ("failed", "refused", "left out")]
    if rows:
        yield Text("")
        yield Text(f"Failed, refused or left out so far: {len(rows)}; the last", style="bold")
    for row in rows[-most:]:
        told = f"  round {row['round']}  {row['client_id']}  {row['status']}: {row['cause']}"
        yield _one_line(told, "yellow")


def _totals(records: RunRecords, live: LiveState | None) -> str:
    parts = []
    for key, word in (("bytes_down", "down"), ("bytes_up", "up")):
        total = records.total(key)
        if total is not None:
            parts.append(f"{with_prefix(total, 'B')} {word}")
    sent_again = records.total("resent")
    parts += [f"{sent_again:.0f} messages sent again"] if sent_again else []
    epsilon = records.last("epsilon")
    parts += [f"epsilon {spelled('epsilon', epsilon[1])}"] if epsilon is not None else []
    return ", ".join(parts)


def _one_line(text: str, style: str) -> Text:
    return Text(_safe(text), style=style, no_wrap=True, overflow="ellipsis")


def _safe(text: str) -> str:
    """The text in one line, without what would move a cursor or ring a bell."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _sentence(text: str) -> str:
    return _safe(text[:1].upper() + text[1:]).rstrip(".") + "."


def sparkline(values: Sequence[float], width: int, *, ascii_only: bool = False) -> str:
    """The values from first to last in at most ``width`` blocks, each the mean of its part."""
    if not values:
        return ""
    count = min(width, len(values))
    edges = [k * len(values) // count for k in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    blocks = ASCII_BLOCKS if ascii_only else BLOCKS
    scale = (len(blocks) - 1) / (high - low) if high > low else 0.0
    return "".join(blocks[round((value - low) * scale)] for value in means)


def duration(seconds: float) -> str:
    """``1:02``, and ``1:00:02`` from an hour on."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
