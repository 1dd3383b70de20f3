"""The tables that ``flexlora eval`` prints of a score report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console

from flexlora.evaluation.evaluate import BASE
from flexlora.evaluation.metrics import METRICS
from flexlora.report.text_table import text_table

__all__ = ["difference_text", "print_scores"]

MOST_PARTS = 40  # rows of a table by category or task
_TITLES = {"perplexity": "perplexity"} | {metric.key: metric.title for metric in METRICS}


def print_scores(report: Mapping[str, Any], console: Console) -> None:
    """Every adapter's scores, their differences with intervals, and a table by group and task."""
    whole = report["all"]
    _print(_adapters(whole["adapters"], console.width), console)
    for same in report["equal_adapters"]:
        console.print(f"\n{', '.join(same)} score alike.", soft_wrap=True)
    if whole["differences"]:
        level = f"{100 * report['bootstrap']['level']:.0f} %"
        console.print(
            f"\nDifferences over {_clients(whole)}, with the {level} interval of a paired "
            "bootstrap over clients:",
            soft_wrap=True,
        )
        _print(_differences(whole["differences"], console.width), console)
    for title in ("groups", "categories", "tasks"):
        parts = {name: part for name, part in report[title].items() if name}
        if len(parts) < 2 or (title == "tasks" and len(report["categories"]) > 1):
            continue
        for metric in _main_metrics(whole):
            console.print(f"\n{_TITLES[metric]} by {_ONE[title]}:", soft_wrap=True)
            _print(_by_part(parts, metric, _ONE[title], console.width), console)
        if len(parts) > MOST_PARTS:
            console.print(f"(the first {MOST_PARTS} of {len(parts)}; --json has all)")


_ONE = {"groups": "group", "categories": "category", "tasks": "task"}


def _print(lines: Iterator[str], console: Console) -> None:
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _clients(table: Mapping[str, Any]) -> str:
    return f"{table['clients']} client{'' if table['clients'] == 1 else 's'}"


def _adapters(adapters: Mapping[str, Mapping[str, float]], width: int) -> Iterator[str]:
    known = ("loss", "perplexity", *(key for key in _TITLES if key not in ("loss", "perplexity")))
    keys = [key for key in known if any(key in of for of in adapters.values())]
    rows = [
        [name, *(_value(key, of.get(key)) for key in keys), str(of["rows"])]
        for name, of in adapters.items()
    ]
    header = ["adapter", *(_TITLES[key] for key in keys), "rows"]
    return text_table(header, rows, width=width, words=[True])


def _differences(differences: Sequence[Mapping[str, Any]], width: int) -> Iterator[str]:
    keys = list(dict.fromkeys(row["metric"] for row in differences))
    found = {(row["adapter"], row["against"], row["metric"]): row for row in differences}
    pairs = dict.fromkeys((row["adapter"], row["against"]) for row in differences)
    rows = [
        [name, against, *(difference_text(found.get((name, against, key))) for key in keys)]
        for name, against in pairs
    ]
    header = ["adapter", "against", *(_TITLES[key] for key in keys)]
    return text_table(header, rows, width=width, words=[True, True])


def _main_metrics(table: Mapping[str, Any]) -> list[str]:
    """The loss, and accuracy or ROUGE-L."""
    known = table["adapters"][BASE]
    return ["loss", *[key for key in ("acc", "rouge_l") if key in known][:1]]


def _by_part(
    parts: Mapping[str, Mapping[str, Any]], metric: str, title: str, width: int
) -> Iterator[str]:
    pairs = dict.fromkeys(
        (row["adapter"], row["against"]) for part in parts.values() for row in part["differences"]
    )
    header = [title, "clients", "rows", BASE]
    header += [f"{a} - {b}" for a, b in pairs]
    rows = []
    for name, part in list(parts.items())[:MOST_PARTS]:
        of_base = part["adapters"][BASE]
        found = {
            (row["adapter"], row["against"]): row
            for row in part["differences"]
            if row["metric"] == metric
        }
        cells = [
            name,
            str(part["clients"]),
            str(of_base["rows"]),
            _value(metric, of_base.get(metric)),
        ]
        rows.append([*cells, *(difference_text(found.get(pair)) for pair in pairs)])
    return text_table(header, rows, width=width, words=[True])


def _value(key: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if key in ("loss", "bits_per_byte") else f"{value:.3f}"


def difference_text(row: Mapping[str, Any] | None) -> str:
    """``-0.213 [-0.250, -0.180]``; without an interval where there is one client."""
    if row is None:
        return ""
    text = f"{row['value']:+.3f}"
    return text if row["low"] is None else f"{text} [{row['low']:+.3f}, {row['high']:+.3f}]"
