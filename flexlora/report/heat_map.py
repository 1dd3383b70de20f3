"""A heat map as inline SVG: modules over rounds, in steps of lightness.

Neighbours of one step are one rectangle with a tooltip, so that 224 modules over 100 rounds stay
small. Rows are grouped by the last part of a module's name; within a group layers go down.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from flexlora.report.axes import Scale, ticks
from flexlora.report.charts import RIGHT, WIDTH, figure, label
from flexlora.report.formats import metric_format
from flexlora.report.markup import Markup, data, element, joined, text
from flexlora.report.style import HEAT_STEPS

__all__ = ["HeatMap", "kind_of", "ordered"]

Columns = Sequence[tuple[int, Mapping[str, float]]]  # (round, {module: value})
LEFT, TOP, BOTTOM = 66, 6, 34
MOST_COLUMNS = 50
MOST_HEIGHT = 300


def kind_of(module: str) -> str:
    """The last part of a module's name: ``q_proj``."""
    return module.rpartition(".")[2]


def ordered(modules: Sequence[str]) -> list[str]:
    """By kind in the order of their first layer, then by layer."""
    kinds = [*dict.fromkeys(map(kind_of, modules))]
    return sorted(modules, key=lambda module: (kinds.index(kind_of(module)), _numbers(module)))


def _numbers(module: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", module)]


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """``metric`` names the unit of the values."""

    key: str
    title: str
    subtitle: str
    metric: str
    columns: Columns

    def drawn(self) -> Markup:
        """The figure; empty without a value."""
        columns = _thinned(self.columns)
        modules = ordered([*dict.fromkeys(m for _, values in columns for m in values)])
        numbers = [v for _, values in columns for v in values.values()]
        if not numbers:
            return Markup("")
        low, high = min(numbers), max(numbers)
        height = max(2.0, min(12.0, MOST_HEIGHT / len(modules)))
        foot = TOP + height * len(modules)
        x = Scale(span=(0, len(columns)), start=LEFT, end=WIDTH - RIGHT)
        body = [
            *_kinds(modules, height),
            *self._cells(columns, modules, x, height, low, high),
            *_rounds(columns, x, foot),
        ]
        return figure(
            self.key,
            self.title,
            *body,
            subtitle=self.subtitle,
            description=self._in_words(modules, columns),
            legend=self._legend(low, high),
            height=foot + BOTTOM,
        )

    def _cells(
        self,
        columns: Columns,
        modules: Sequence[str],
        x: Scale,
        height: float,
        low: float,
        high: float,
    ) -> Iterator[Markup]:
        shown = metric_format(self.metric)
        for row, module in enumerate(modules):
            steps = [_step(values.get(module), low, high) for _, values in columns]
            start = 0
            for step, run in groupby(steps):
                end = start + len(list(run))
                if step is not None:
                    first, last = columns[start], columns[end - 1]
                    when = f"round {first[0]}" + (f" to {last[0]}" if end - start > 1 else "")
                    values = [first[1][module], last[1][module]][: end - start]
                    words = " to ".join(dict.fromkeys(map(shown, values)))
                    yield element(
                        "rect",
                        element("title", text(f"{module}, {when}: {words}")),
                        x=f"{x(start):.1f}",
                        y=f"{TOP + row * height:.1f}",
                        width=f"{x(end) - x(start) + 0.2:.1f}",
                        height=f"{height - (0.6 if height > 4 else -0.1):.1f}",
                        class_=f"heat h{step}",
                    )
                start = end

    def _legend(self, low: float, high: float) -> Markup:
        """The lightness of both ends and of what lies between."""
        shown = metric_format(self.metric)
        width = 12
        squares = joined(
            element("rect", x=f"{s * width}", y="0", width="12", height="12", class_=f"heat h{s}")
            for s in range(HEAT_STEPS)
        )
        size = {"width": f"{HEAT_STEPS * width}", "height": "12", "aria_hidden": "true"}
        bar = element("svg", squares, **size)
        ends = element("li", data(low, shown(low)), bar, data(high, shown(high)))
        return element("ul", ends, class_="keys")

    def _in_words(self, modules: Sequence[str], columns: Columns) -> str:
        """Of each kind of module the lowest and the highest value in the first and last round."""
        shown, parts = metric_format(self.metric), []
        for kind, group in groupby(modules, kind_of):
            members = [*group]
            ends = []
            for at, values in _ends(columns):
                found = [values[module] for module in members if module in values]
                if found:
                    words = " to ".join(dict.fromkeys((shown(min(found)), shown(max(found)))))
                    ends.append(f"{words} in round {at}")
            parts.append(f"{kind}: {', '.join(ends)}.")
        return " ".join(parts)


def _ends(
    columns: Columns,
) -> Columns:
    return [columns[0], columns[-1]] if len(columns) > 1 else columns


def _thinned(
    columns: Columns,
) -> Columns:
    """At most ``MOST_COLUMNS`` rounds, evenly spaced, the first and the last among them."""
    if len(columns) <= MOST_COLUMNS:
        return columns
    last = len(columns) - 1
    chosen = {round(at * last / (MOST_COLUMNS - 1)) for at in range(MOST_COLUMNS)}
    return [columns[at] for at in sorted(chosen)]


def _step(value: float | None, low: float, high: float) -> int | None:
    if value is None:
        return None
    if high == low:
        return HEAT_STEPS - 1
    return min(HEAT_STEPS - 1, int(HEAT_STEPS * (value - low) / (high - low)))


def _kinds(modules: Sequence[str], height: float) -> Iterator[Markup]:
    """The name of each group beside its rows, where it does not cover the one above."""
    row, covered = 0, 0.0
    for kind, group in groupby(modules, kind_of):
        count = len([*group])
        middle = TOP + (row + count / 2) * height
        if middle - 6 >= covered:
            yield label(kind if len(kind) <= 10 else f"{kind[:9]}…", LEFT - 5, middle + 3.6, "end")
            covered = middle + 6
        if row:
            at = f"{TOP + row * height - 0.3:.1f}"
            yield element("line", x1="4", x2=f"{LEFT}", y1=at, y2=at, class_="grid")
        row += count


def _rounds(columns: Columns, x: Scale, foot: float) -> Iterator[Markup]:
    numbers = [at for at, _ in columns]
    for value in ticks((numbers[0], max(numbers[-1], numbers[0] + 1)), whole=True):
        place = min(range(len(numbers)), key=lambda at: abs(numbers[at] - value))
        if abs(numbers[place] - value) * len(numbers) <= max(numbers[-1] - numbers[0], 1):
            yield label(f"{value:g}", x(place + 0.5), foot + 15, "middle")
    yield label("round", (LEFT + WIDTH - RIGHT) / 2, foot + BOTTOM - 4, "middle", kind="title")
