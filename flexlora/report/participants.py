"""Who took part: every client's rank class, device, train rows and rounds, as one picture.

Clients stand side by side, sorted by class, device and rows, each as wide as the picture divided
by their number, so that three of them and thousands of them give the same picture.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from flexlora.report.axes import Scale, ticks
from flexlora.report.charts import LEFT, RIGHT, WIDTH, figure, label
from flexlora.report.formats import format_counts
from flexlora.report.markup import Markup, data, element, joined, name, table, text
from flexlora.report.records import RunRecords, cell_number
from flexlora.report.style import NUM_STYLES

__all__ = ["Participant", "devices_table", "participants", "participants_figure"]

RIBBON, TRACK, GAP, TOP = 15, 66, 22, 4
HEIGHT = TOP + 2 * (RIBBON + 2) + 2 * (TRACK + GAP) + 20
LETTER = 6.2  # the width of a letter in a ribbon
WIDE = 20.0  # the largest over the median number of rows, from which the axis is logarithmic


@dataclass(frozen=True, kw_only=True)
class Participant:
    """``rows`` and ``device`` are unknown before a client is asked; ``trained`` of ``asked``."""

    client_id: str
    rank_class: str
    device: str
    rows: int
    asked: int
    trained: int


def participants(run: RunRecords) -> list[Participant]:
    """Every client with a rank class, of the checkpoint or the table, as the picture has them."""
    last = {row["client_id"]: row for row in run.clients if row["rank_class"]}
    asked = Counter(row["client_id"] for row in run.clients if row["rank_class"])
    trained = Counter(row["client_id"] for row in run.clients if row["status"] == "ok")
    classes = {client: str(given.get("name")) for client, given in run.classes.items()}
    classes = {client: row["rank_class"] for client, row in last.items()} | classes
    found = [
        Participant(
            client_id=client,
            rank_class=rank_class,
            device=last[client]["device"] if client in last else "",
            rows=int(cell_number(last[client]["num_examples"]) or 0) if client in last else 0,
            asked=asked[client],
            trained=trained[client],
        )
        for client, rank_class in classes.items()
    ]
    order = {rank_class: place for place, rank_class in enumerate(run.rank_classes)}
    place = len(order)
    return sorted(
        found, key=lambda p: (order.get(p.rank_class, place), not p.device, p.device, p.rows)
    )


def participants_figure(run: RunRecords) -> Markup:
    """The picture; empty before anybody is known."""
    clients = participants(run)
    if not clients:
        return Markup("")
    styles = {rank_class: at % NUM_STYLES for at, rank_class in enumerate(run.rank_classes)}
    devices = [*dict.fromkeys(client.device for client in clients if client.device)]
    x = Scale(span=(0, len(clients)), start=LEFT, end=WIDTH - RIGHT)
    rows_top = TOP + 2 * (RIBBON + 2) + GAP - 2
    rounds_top = rows_top + TRACK + GAP
    parts = [
        *_ribbon(clients, x, TOP, lambda c: c.rank_class, _short(styles), colours=styles),
        *_ribbon(clients, x, TOP + RIBBON + 2, lambda c: c.device, _numbers(devices)),
        label("class", LEFT - 7, TOP + RIBBON - 4, "end"),
        label("device", LEFT - 7, TOP + 2 * RIBBON - 2, "end"),
        *_track(clients, x, rows_top, "train rows", lambda c: c.rows, styles),
        *_track(clients, x, rounds_top, "rounds", lambda c: c.trained, styles, lambda c: c.asked),
        label(_axis(len(clients)), (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, "middle", kind="title"),
    ]
    return figure(
        "participants",
        "Who took part",
        *parts,
        subtitle="by rank class, device and train rows; grey: asked for, not counted",
        description=_in_words(clients, run.rank_classes),
        legend=_legend(devices),
        height=HEIGHT,
    )


def _axis(count: int) -> str:
    return "1 client" if count == 1 else f"{count:,} clients"


def _short(styles: dict[str, int]) -> dict[str, str]:
    """``rank_8`` as ``8`` where all classes are named so."""
    plain = all(rank_class.startswith("rank_") for rank_class in styles)
    return {c: c.removeprefix("rank_") if plain else c for c in styles}


def _numbers(devices: Sequence[str]) -> dict[str, str]:
    return {device: str(at) for at, device in enumerate(devices, start=1)}


def _ribbon(
    clients: Sequence[Participant],
    x: Scale,
    top: float,
    kind_of: Callable[[Participant], str],
    shown: dict[str, str],
    colours: dict[str, int] | None = None,
) -> Iterator[Markup]:
    """One block for neighbours of one kind, with its name where that fits."""
    start = 0
    for place, (kind, group) in enumerate(groupby(clients, kind_of)):
        count = len(list(group))
        left, width = x(start), x(start + count) - x(start)
        start += count
        if not kind:
            continue
        style = f"bar s{colours.get(kind, 0)}" if colours else "group" + " odd" * (place % 2)
        title = element("title", text(f"{kind}: {_axis(count)}"))
        yield element(
            "rect",
            title,
            x=f"{left:.2f}",
            y=f"{top}",
            width=f"{max(width - 0.5, 0.3):.2f}",
            height=f"{3 if colours else RIBBON}",
            class_=style,
        )
        words = shown.get(kind, kind)
        if len(words) * LETTER <= width:
            yield label(words, left + width / 2, top + RIBBON - 1 - 3 * (not colours), "middle")


def _track(
    clients: Sequence[Participant],
    x: Scale,
    top: float,
    title: str,
    value_of: Callable[[Participant], int],
    styles: dict[str, int],
    behind: Callable[[Participant], int] | None = None,
) -> Iterator[Markup]:
    """A bar per client on one axis; ``behind`` is a paler bar behind it."""
    most = max(max(map(behind or value_of, clients)), 1)
    usual = sorted(map(value_of, clients))[len(clients) // 2]
    narrow = most <= WIDE * max(usual, 1)
    shape = float if narrow else lambda value: math.log10(1 + value)
    levels = (
        [level for level in ticks((0.0, most), 3) if level <= most] if narrow else _decades(most)
    )
    y = Scale(span=(0.0, shape(max(most, levels[-1]))), start=top + TRACK, end=top)
    for level in levels:
        at = f"{y(shape(level)):.1f}"
        yield element("line", x1=f"{LEFT}", x2=f"{WIDTH - RIGHT}", y1=at, y2=at, class_="grid")
        yield label(f"{level:,.6g}", LEFT - 7, y(shape(level)) + 3.8, "end")
    if behind is not None:
        heights = [y(shape(behind(client))) for client in clients]
        yield element("path", d=_bars(x, 0, heights, y.start), class_="asked")
    start = 0
    for rank_class, group in groupby(clients, lambda client: client.rank_class):
        members = list(group)
        heights = [y(shape(value_of(client))) for client in members]
        low, high = min(map(value_of, members)), max(map(value_of, members))
        span = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        tip = element("title", text(f"{rank_class}, {_axis(len(members))}: {span} {title}"))
        style = f"bar s{styles.get(rank_class, 0)}"
        yield element("path", tip, d=_bars(x, start, heights, y.start), class_=style)
        start += len(members)
    yield label(title, LEFT, top - 6, "start", kind="title")


def _decades(most: float) -> list[float]:
    return [0.0, *(10.0**power for power in range(1, math.ceil(math.log10(most + 1)) + 1))]


def _bars(x: Scale, start: int, heights: Sequence[float], foot: float) -> str:
    """The outlines of the bars of neighbours, with a gap between them where there is room."""
    width = x(1) - x(0)
    bar = width * (0.86 if width > 3 else 1.0)
    return "".join(
        f"M{x(start + at):.2f} {foot:.1f}V{height:.1f}h{bar:.2f}V{foot:.1f}z"
        for at, height in enumerate(heights)
        if height < foot
    )


def _legend(devices: Sequence[str]) -> Markup:
    """The devices by their number in the ribbon."""
    items = [
        element("li", text(f"{number} "), name(device))
        for device, number in _numbers(devices).items()
    ]
    return element("ul", joined(items), class_="legend") if items else Markup("")


def _in_words(clients: Sequence[Participant], classes: Sequence[str]) -> str:
    parts = [f"{_axis(len(clients))}."]
    for rank_class in classes:
        members = [client for client in clients if client.rank_class == rank_class]
        if members:
            rows = sum(client.rows for client in members)
            rounds = sum(client.trained for client in members)
            kinds = format_counts(client.device or "not asked yet" for client in members)
            parts.append(
                f"{rank_class}: {_axis(len(members))}, {kinds}, {rows:,} train rows, "
                f"{rounds:,} trainings counted."
            )
    return " ".join(parts)


def devices_table(run: RunRecords) -> Markup:
    """A row per device: the same numbers as in the picture; empty without a client."""
    clients = participants(run)
    devices = dict.fromkeys(client.device for client in clients)
    rows = []
    for device in devices:
        members = [client for client in clients if client.device == device]
        counts = [
            len(members),
            sum(client.rows for client in members),
            sum(client.asked for client in members),
            sum(client.trained for client in members),
        ]
        classes = Counter(client.rank_class for client in members)  # in the order of the picture
        kinds = ", ".join(f"{rank_class} ({count})" for rank_class, count in classes.items())
        cells = [data(count, f"{count:,}", derived=True) for count in counts]
        rows.append([name(device or "(not asked yet)"), name(kinds), *cells])
    if not rows:
        return Markup("")
    header = ["device", "rank classes", "clients", "train rows", "trainings asked", "counted"]
    return table(header, rows, words=2, caption="Clients by device")
