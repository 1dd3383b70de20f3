"""``flexlora report RUN``: one run on one page."""

from __future__ import annotations

import os
from pathlib import Path

from flexlora.errors import UserError
from flexlora.report import sections
from flexlora.report.answers import answers
from flexlora.report.charts import Chart, drawn
from flexlora.report.class_table import classes_table
from flexlora.report.markup import Markup, document, element, joined, name, text
from flexlora.report.module_charts import module_figures
from flexlora.report.participants import devices_table, participants_figure
from flexlora.report.privacy_spent import privacy_spent
from flexlora.report.records import RunRecords, read_run
from flexlora.report.run_charts import (
    CHARTS,
    PERSONAL_CHARTS,
    charts_of,
    clients_chart,
    failures_chart,
)
from flexlora.report.targets import targets_table

__all__ = ["figures", "run_page", "write_page", "write_report"]

FILE = "report.html"


def write_report(path: str | Path) -> Path:
    """Write RUN/report.html from the other files of the run, deterministically.

    Raises:
        UserError: it is no run folder, a file is damaged, or the folder cannot be written.
    """
    run = read_run(path)
    return write_page(run.path / FILE, run_page(run))


def write_page(file: Path, page: str) -> Path:
    """Write the page to a temporary file, then rename it."""
    partial = file.with_name(file.name + ".partial")
    try:
        partial.write_text(page, encoding="utf-8", newline="\n")
        os.replace(partial, file)
    except OSError as error:
        raise UserError(f"'{file}' cannot be written: {error.strerror}.") from None
    return file


def run_page(run: RunRecords) -> str:
    """The page of a finished or unfinished run."""
    title = f"FlexLoRA run {run.path.resolve().name}"
    parts = [element("h1", text("Run "), name(run.path.resolve().name)), _about(run), _state(run)]
    if run.last_round >= 0:
        parts += [sections.headline(run), section("Held-out rows", sections.scores_table(run))]
        parts += _unless_empty("To a target loss", targets_table(run))
        parts += [section("Round by round", figures(charts_of(run, CHARTS)))]
    parts += _unless_empty("Who took part", _figures(participants_figure(run)), devices_table(run))
    parts += [section("Rank classes", classes_table(run))]
    if run.last_round >= 0:
        parts += [
            *_unless_empty("Answers", answers(run)),
            *_unless_empty("Module by module", *(_figures(*row) for row in module_figures(run))),
            *_unless_empty("Privacy", *privacy_spent(run)),
            *_charts("Personal against global", charts_of(run, PERSONAL_CHARTS)),
            *_charts("Client by client", charts_of(run, [clients_chart])),
        ]
    parts += [
        section(
            "Failures and notes", figures(charts_of(run, [failures_chart])), sections.failures(run)
        ),
        section("Configuration that is not the default", sections.changed_settings(run)),
        section("Versions and machine", sections.versions(run)),
        *_folded("All numbers by round", sections.rounds_table(run)),
        *_folded("The last sum, module by module", sections.modules_table(run)),
    ]
    return document(title, *parts)


def section(title: str, *content: Markup) -> Markup:
    return element("section", element("h2", text(title)), *content)


def figures(charts: list[Chart]) -> Markup:
    return _figures(*map(drawn, charts))


def _figures(*drawn_ones: Markup) -> Markup:
    """Figures side by side; empty without any."""
    whole = joined(drawn_ones)
    return element("div", whole, class_="figures") if whole else whole


def _about(run: RunRecords) -> Markup:
    """The method, the base, the data and the seed."""
    data = next((run.setting(k) for k in ("data.path", "data.name") if run.setting(k)), "built-in")
    method, base = name(run.setting("method.name")), name(run.setting("model.name"))
    rest = text(f" ({run.setting('eval.split')} rows), seed {run.setting('seed')}.")
    words = [text("Method "), method, text(" on base "), base, text(", data "), name(data), rest]
    return element("p", *words, class_="soft")


def _state(run: RunRecords) -> Markup:
    """The last finished round of a run that is not finished; its end by a privacy budget."""
    if run.budget_spent:
        cause = f"Round {run.last_round} is the last: {run.budget_spent}."
        return element("p", text(cause), class_="warn")
    if run.finished:
        return Markup("")
    if run.last_round < 0:
        state = "No round is done yet, not even the evaluation of the base."
    else:
        state = (
            f"Not finished: round {run.last_round} of {run.num_rounds} is the last that is done."
        )
    return element("p", text(state), class_="warn")


def _unless_empty(title: str, *content: Markup) -> list[Markup]:
    return [section(title, *content)] if any(content) else []


def _charts(title: str, charts: list[Chart]) -> list[Markup]:
    return _unless_empty(title, figures(charts))


def _folded(title: str, content: Markup) -> list[Markup]:
    """A collapsed table; nothing without content."""
    return [element("details", element("summary", text(title)), content)] if content else []
