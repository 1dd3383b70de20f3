"""The page of ``flexlora privacy``: epsilon over rounds, one line for each way of sampling."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flexlora.privacy.accounting import Mechanism, epsilon_of, interval_for
from flexlora.report.charts import Chart, Series
from flexlora.report.markup import data, document, element, table, text
from flexlora.report.page import figures, write_page

__all__ = ["write_privacy_page"]

MOST_POINTS = 20


def write_privacy_page(
    file: str | Path, mechanisms: Mapping[str, Mechanism], num_rounds: int, delta: float
) -> Path:
    """Write epsilon after up to 20 evenly spaced rounds, as a picture and as a table.

    Raises:
        UserError: the file cannot be written.
    """
    rounds = _spaced(num_rounds)
    lines = {
        title: [(t, _epsilon(mechanism, t, delta)) for t in rounds]
        for title, mechanism in mechanisms.items()
    }
    series = tuple(
        Series(name=title, points=tuple(points), style=style)
        for style, (title, points) in enumerate(lines.items())
    )
    chart = Chart(
        key="epsilon",
        title="Epsilon",
        subtitle=f"at delta {delta:g}",
        series=series,
        shown=lambda value: f"{value:.4g}",
        tick=lambda value: f"{value:.6g}",
    )
    rows = [
        [text(t), *(data(points[i][1], f"{points[i][1]:.4g}") for points in lines.values())]
        for i, t in enumerate(rounds)
    ]
    title = "Epsilon over rounds"
    numbers = table(["round", *lines], rows, caption="Epsilon by round")
    body = [element("h1", text(title)), figures([chart]), numbers]
    return write_page(Path(file), document(title, *body))


def _spaced(num_rounds: int) -> list[int]:
    """Up to ``MOST_POINTS`` rounds, the first and the last among them."""
    count = min(num_rounds, MOST_POINTS)
    if count == 1:
        return [1]
    return sorted({1 + round(i * (num_rounds - 1) / (count - 1)) for i in range(count)})


def _epsilon(mechanism: Mechanism, num_rounds: int, delta: float) -> float:
    rough = epsilon_of([(mechanism, num_rounds)], delta, interval_for(1.0))
    return rough if rough >= 1 else epsilon_of([(mechanism, num_rounds)], delta)
