"""Line and bar charts as inline SVG, without scripts or libraries.

A chart has a title and a description for screen readers, and a tooltip per point. Lines that
coincide are drawn once with all of their names: otherwise only the last would be visible.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from flexlora.report.axes import Scale, Span, span_of, ticks, united
from flexlora.report.markup import Markup, element, joined, text
from flexlora.report.style import NUM_STYLES

__all__ = ["Chart", "Series", "drawn", "figure", "label", "on_common_axes", "with_points"]

WIDTH, HEIGHT = 350, 214
LEFT, RIGHT, TOP, BOTTOM = 56, 10, 10, 34
DRAWABLE = 1e100
MOST_MARKS = 40  # of a line of many points: more would hide it
# Marks around (0, 0): disc, square, diamond, triangle.
NOTHING = Markup("")
_MARKS = (
    "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0 -6 0z",
    "M-2.8 -2.8h5.6v5.6h-5.6z",
    "M0 -4l4 4l-4 4l-4 -4z",
    "M0 -3.8l3.9 6.6h-7.8z",
)


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line or one colour of bars; ``style`` is its index in the palette.

    Values beyond ``DRAWABLE`` (a diverged loss) are left out; the tables have them.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    style: int = 0

    def __post_init__(self) -> None:
        drawable = tuple(point for point in self.points if abs(point[1]) < DRAWABLE)
        object.__setattr__(self, "points", drawable)


def with_points(series: Iterable[Series]) -> tuple[Series, ...]:
    """The series that have points; a chart needs at least one."""
    return tuple(line for line in series if line.points)


@dataclass(frozen=True, kw_only=True)
class Chart:
    """``key`` is unique on a page; ``shown`` formats a value, ``tick`` one at an axis.

    A span of None is computed from the series.
    """

    key: str
    title: str
    series: tuple[Series, ...]
    shown: Callable[[float], str]
    tick: Callable[[float], str]
    subtitle: str = ""
    x_name: str = "round"
    x_tick: Callable[[float], str] | None = None
    whole_x: bool = True
    bars: bool = False
    x_span: Span | None = None
    y_span: Span | None = None

    @property
    def spans(self) -> tuple[Span, Span]:
        """The horizontal and the vertical span."""
        xs = [x for line in self.series for x, _ in line.points]
        ys = [y for line in self.series for _, y in line.points]
        low, high = self.x_span or (min(xs), max(xs))
        if low == high:
            low, high = low - 1, high + 1
        return (low, high), self.y_span or span_of(ys, from_zero=self.bars)

    def spelled_x(self, value: float) -> str:
        return f"{value:.6g}" if self.x_tick is None else self.x_tick(value)

    def tooltip(self, name: str, x: float, y: float) -> Markup:
        words = f"{name}, {self.x_name} {self.spelled_x(x)}: {self.shown(y)}"
        return element("title", text(words))


def on_common_axes(charts: Sequence[Chart]) -> list[Chart]:
    """The charts with equal axes, so that they can be compared."""
    if not charts:
        return []
    horizontal = united([chart.spans[0] for chart in charts])
    vertical = united([chart.spans[1] for chart in charts])
    return [replace(chart, x_span=horizontal, y_span=vertical) for chart in charts]


def drawn(chart: Chart) -> Markup:
    """The chart as a figure with its caption and its legend."""
    x_span, y_span = chart.spans
    air = 0.5 if chart.bars else 0.0  # half a bar beyond the first and the last position
    levels = ticks(y_span)
    x = Scale(span=(x_span[0] - air, x_span[1] + air), start=LEFT, end=WIDTH - RIGHT)
    y = Scale(span=(levels[0], levels[-1]), start=HEIGHT - BOTTOM, end=TOP)
    groups = [(line, [line.name]) for line in chart.series]
    if not chart.bars:
        groups = _merged(chart.series, x, y)
    bodies = _bars(chart, x, y) if chart.bars else _lines(chart, groups, x, y)
    return figure(
        chart.key,
        chart.title,
        *_axes(chart, x, y, levels),
        *bodies,
        subtitle=chart.subtitle,
        description=_description(chart, groups),
        legend=_legend(chart, groups),
    )


def figure(
    key: str,
    title: str,
    *picture: Markup,
    description: str,
    subtitle: str = "",
    legend: Markup = NOTHING,
    height: float = HEIGHT,
) -> Markup:
    """A picture ``WIDTH`` wide with its caption, and what it shows in words."""
    svg = element(
        "svg",
        element("title", text(title), id=f"{key}-title"),
        element("desc", text(description), id=f"{key}-desc"),
        *picture,
        viewBox=f"0 0 {WIDTH} {height:.0f}",
        role="img",
        aria_labelledby=f"{key}-title {key}-desc",
    )
    small = element("small", text(subtitle)) if subtitle else Markup("")
    return element("figure", element("figcaption", text(title), small), legend, svg)


def _merged(series: Sequence[Series], x: Scale, y: Scale) -> list[tuple[Series, list[str]]]:
    """Series grouped with the names of all series that coincide with them."""
    groups: list[tuple[Series, list[str]]] = []
    for line in series:
        same = next((names for first, names in groups if _same_line(first, line, x, y)), None)
        if same is None:
            groups.append((line, [line.name]))
        else:
            same.append(line.name)
    return groups


def _same_line(one: Series, other: Series, x: Scale, y: Scale) -> bool:
    """Whether all points coincide within half a pixel."""
    return len(one.points) == len(other.points) and all(
        abs(x(a) - x(c)) < 0.5 and abs(y(b) - y(d)) < 0.5
        for (a, b), (c, d) in zip(one.points, other.points, strict=True)
    )


def _description(chart: Chart, groups: Sequence[tuple[Series, list[str]]]) -> str:
    """The first and the last value of every line, in words."""
    parts = []
    for line, names in groups:
        (x0, y0), (x1, y1) = line.points[0], line.points[-1]
        first = f"{chart.shown(y0)} at {chart.x_name} {chart.spelled_x(x0)}"
        last = f", {chart.shown(y1)} at {chart.x_name} {chart.spelled_x(x1)}" if x1 != x0 else ""
        parts.append(f"{', '.join(names)}: {first}{last}.")
    return " ".join(parts)


def _axes(chart: Chart, x: Scale, y: Scale, levels: Sequence[float]) -> Iterator[Markup]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    for value in levels:
        at = f"{y(value):.1f}"
        yield element("line", x1=f"{LEFT}", x2=f"{right}", y1=at, y2=at, class_="grid")
        yield label(chart.tick(value), LEFT - 7, y(value) + 3.8, "end")
    for value in ticks(chart.spans[0], whole=chart.whole_x):
        if x.span[0] <= value <= x.span[1]:
            yield label(chart.spelled_x(value), x(value), bottom + 15, "middle")
    base = f"{bottom}"
    yield element("line", x1=f"{LEFT}", x2=f"{right}", y1=base, y2=base, class_="axis")
    yield label(chart.x_name, (LEFT + right) / 2, HEIGHT - 4, "middle", kind="title")


def label(shown: str, x: float, y: float, anchor: str, kind: str = "tick") -> Markup:
    return element("text", text(shown), x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, class_=kind)


def _lines(
    chart: Chart, groups: Sequence[tuple[Series, list[str]]], x: Scale, y: Scale
) -> Iterator[Markup]:
    for line, _ in groups:
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line.points)
        yield element("polyline", points=path, class_=f"line {_style(line)}")
    for line, names in groups:
        for a, b in line.points[:: math.ceil(len(line.points) / MOST_MARKS)]:
            tooltip = chart.tooltip(", ".join(names), a, b)
            yield _mark(line, f"translate({x(a):.1f} {y(b):.1f})", tooltip)


def _bars(chart: Chart, x: Scale, y: Scale) -> Iterator[Markup]:
    """Bars of all series side by side over every position."""
    room = 0.8 * (x(1.0) - x(0.0))
    width = room / len(chart.series)
    for place, line in enumerate(chart.series):
        for a, b in line.points:
            top, foot = sorted((y(b), y(0.0)))
            yield element(
                "rect",
                chart.tooltip(line.name, a, b),
                x=f"{x(a) - room / 2 + place * width:.2f}",
                y=f"{top:.2f}",
                width=f"{max(width - 1, 0.5):.2f}",
                height=f"{foot - top:.2f}",
                class_=f"bar {_style(line)}",
            )


def _legend(chart: Chart, groups: Sequence[tuple[Series, list[str]]]) -> Markup:
    """The names with their colours and marks; empty if the only name is the title."""
    if [line.name.lower() for line in chart.series] == [chart.title.lower()]:
        return Markup("")
    items = []
    for line, names in groups:
        swatch = element(
            "svg",
            element("line", x1="0", x2="22", y1="6", y2="6", class_=f"line {_style(line)}"),
            _mark(line, "translate(11 6)"),
            width="22",
            height="12",
            viewBox="0 0 22 12",
            aria_hidden="true",
        )
        several = " (one line)" if len(names) > 1 else ""
        items.append(element("li", swatch, element("span", text(", ".join(names) + several))))
    return element("ul", joined(items), class_="legend")


def _mark(line: Series, transform: str, *content: Markup) -> Markup:
    # The ninth series has the first colour with another mark.
    shape = _MARKS[(line.style + line.style // NUM_STYLES) % len(_MARKS)]
    return element("path", *content, d=shape, transform=transform, class_=f"mark {_style(line)}")


def _style(line: Series) -> str:
    return f"s{line.style % NUM_STYLES}"
