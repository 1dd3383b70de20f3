"""``flexlora compare RUN RUN ...``: a comparison of runs, in the terminal and on a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from flexlora.errors import UserError
from flexlora.report.charts import Chart, Series, on_common_axes, with_points
from flexlora.report.comparison import Cell, Comparison, compared, read_runs
from flexlora.report.formats import format_metric, metric_format, tick_format
from flexlora.report.markup import Markup, data, document, element, name, table, text
from flexlora.report.page import figures, section, write_page
from flexlora.report.records import RunRecords
from flexlora.report.run_charts import CHARTS, PERSONAL_CHARTS, PRIVACY_CHARTS
from flexlora.report.targets import shared_targets, so_far
from flexlora.report.text_table import text_table

__all__ = ["compare", "comparison_page"]


def compare(paths: Sequence[str | Path], *, out: str | Path | None, console: Console) -> int:
    """Print the table of the runs in ``paths`` and, with ``out``, write their page.

    Raises:
        UserError: see ``read_runs``; an ``out`` that is no HTML file or cannot be written.
    """
    file = None if out is None else Path(out)
    if file is not None and file.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out is '{out}', expected the name of a page that ends in .html.")
    runs = read_runs(paths)
    comparison = compared(runs)
    for line in _lines(comparison, console.width):
        console.print(line, soft_wrap=True)
    for note in comparison.notes:
        console.print(f"\n{note}", soft_wrap=True)
    if file is not None:
        page = write_page(file, comparison_page(runs, comparison))
        console.print(f"\nPage: {page}", soft_wrap=True)
    return 0


def _lines(comparison: Comparison, width: int) -> Iterable[str]:
    header = ["run", *(column.title for column in comparison.columns)]
    rows = [
        [run, *(column.cells[index].shown for column in comparison.columns)]
        for index, run in enumerate(comparison.names)
    ]
    words = [True, *(column.words for column in comparison.columns)]
    return text_table(header, rows, width=width, words=words)


def comparison_page(runs: Sequence[RunRecords], comparison: Comparison) -> str:
    """The table, charts with all runs, and each chart of a run's page for every run."""
    title = f"{len(runs)} runs side by side"
    parts = [element("h1", text(title)), _results(comparison)]
    parts += [element("p", text(note), class_="warn") for note in comparison.notes]
    together = _together(runs, comparison.names)
    parts += [section("In one picture", figures(together))] if together else []
    if comparison.comparable and (target := shared_targets(runs, comparison.names)):
        title = f"To a held-out loss of {format_metric('eval_loss', target[0])}"
        about = text("The lowest loss that every run has reached.")
        parts += [section(title, element("p", about, class_="soft"), target[1])]
    parts += [section("Settings that differ", _settings(comparison))]
    return document(f"FlexLoRA: {title}", *parts, *_side_by_side(runs, comparison.names))


def _results(comparison: Comparison) -> Markup:
    """A row per run."""
    columns = [column for column in comparison.columns if not column.setting]
    rows = [
        [name(run), *(_cell(column.cells[index]) for column in columns)]
        for index, run in enumerate(comparison.names)
    ]
    words = 1 + sum(column.words for column in columns)
    return table(
        ["run", *(column.title for column in columns)], rows, words=words, caption="Results"
    )


def _settings(comparison: Comparison) -> Markup:
    """A row per key and a column per run."""
    columns = [column for column in comparison.columns if column.setting]
    if not columns:
        return element("p", text("None: these are runs of one configuration."))
    rows = [
        [element("code", text(column.title)), *(name(cell.shown) for cell in column.cells)]
        for column in columns
    ]
    words = 1 + len(comparison.names)
    return table(["key", *comparison.names], rows, words=words, caption="Settings that differ")


def _cell(cell: Cell) -> Markup:
    if cell.value is None:
        return name(cell.shown)
    return data(cell.value, cell.shown, derived=cell.derived)


def _together(runs: Sequence[RunRecords], names: Sequence[str]) -> list[Chart]:
    """One line per run: the loss by round, by bytes and by simulated time; exact match by round."""
    loss = "Held-out loss, each client at its own rank"
    charts = [
        _overlay(runs, names, "eval_loss", loss),
        _overlay(runs, names, "eval_exact_match", "Exact match of generated answers"),
        _overlay(runs, names, "eval_loss", loss, over=("bytes_down", "bytes_up")),
        _overlay(runs, names, "eval_loss", loss, over=("simulated_seconds",)),
    ]
    return [chart for chart in charts if chart is not None]


_OVER = {
    "bytes_down": ("by bytes, down and up together", "bytes so far"),
    "simulated_seconds": ("by simulated time", "simulated seconds so far"),
}


def _overlay(
    runs: Sequence[RunRecords],
    names: Sequence[str],
    key: str,
    title: str,
    *,
    over: Sequence[str] = (),
) -> Chart | None:
    """``key`` of every run over its rounds, or over the running sum of the keys ``over``."""
    series = []
    for style, (run, run_name) in enumerate(zip(runs, names, strict=True)):
        spent = so_far(run, over)
        points = tuple((spent.get(at, 0.0) if over else at, v) for at, v in run.points(key))
        if spent or not over:
            series.append(Series(name=run_name, points=points, style=style))
    if not with_points(series):
        return None
    subtitle, x_name = _OVER[over[0]] if over else ("by round", "round")
    return Chart(
        key="-".join(("together", key, *over)).replace("_", "-"),
        title=title,
        subtitle=subtitle,
        series=with_points(series),
        shown=metric_format(key),
        tick=tick_format(key),
        x_name=x_name,
        x_tick=tick_format(over[0]) if over else None,
        whole_x=not over,
    )


def _side_by_side(runs: Sequence[RunRecords], names: Sequence[str]) -> list[Markup]:
    """Every chart of a run's page, for all runs on the same axes."""
    parts = []
    for maker in (*CHARTS, *PRIVACY_CHARTS, *PERSONAL_CHARTS):
        pairs = enumerate(zip(names, runs, strict=True))
        made = [(i, run_name, chart) for i, (run_name, run) in pairs if (chart := maker(run))]
        if made:
            charts = [
                replace(chart, key=f"{chart.key}-{i}", title=run_name, subtitle="")
                for i, run_name, chart in made
            ]
            first = made[0][2]
            about = element("p", text(first.subtitle), class_="soft")
            parts.append(section(first.title, about, figures(on_common_axes(_recolour(charts)))))
    return parts


def _recolour(charts: Sequence[Chart]) -> list[Chart]:
    """Give each name the same colour in all charts."""
    known = [*dict.fromkeys(line.name for chart in charts for line in chart.series)]
    return [
        replace(chart, series=tuple(replace(s, style=known.index(s.name)) for s in chart.series))
        for chart in charts
    ]
