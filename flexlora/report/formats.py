"""Formats of metrics and settings, in a terminal and on a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from flexlora.units import human_bytes, human_seconds, with_prefix

__all__ = [
    "SCORES",
    "TOTALS",
    "format_counts",
    "format_metric",
    "format_setting",
    "metric_format",
    "tick_format",
]

# Metrics with their column titles: scores of one round, and sums over all rounds.
SCORES = {
    "eval_loss": "loss",
    "eval_bits_per_byte": "bits/byte",
    "eval_exact_match": "exact match",
    "eval_rouge_l": "ROUGE-L",
    "eval_acc": "acc",
    "eval_acc_norm": "acc_norm",
    "eval_pattern": "pattern",
}
TOTALS = {
    "bytes_down": "down",
    "bytes_up": "up",
    "seconds": "seconds",
    "simulated_seconds": "simulated",
    "joules": "joules",
    "clients_failed": "failures",
}


def format_setting(value: object) -> str:
    """A value of the configuration as ``--set`` takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return "(empty)" if value == "" else str(value)


def format_counts(kinds: Iterable[str]) -> str:
    """``nf4 (3), none (1)``; the name alone where there is one kind."""
    counts = Counter(kinds)
    if len(counts) < 2:
        return "".join(counts)
    return ", ".join(f"{kind} ({count})" for kind, count in sorted(counts.items()))


def _count(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else f"{value:.2f}"


def _three_decimals(value: float) -> str:
    """A loss or a fraction; with two significant digits below 0.01."""
    return f"{value:.2g}" if 0 < abs(value) < 0.01 else f"{value:.3f}"


def _unit(key: str) -> str:
    """The unit of a metric by its name, without a suffix after a slash."""
    name = key.partition("/")[0]
    if "bytes" in name:
        return "B"
    if name.endswith("energy") or name == "energy_kept":
        return "%"
    if name.startswith(("clients", "round", "rank", "rows")):
        return "count"
    return "s" if name.endswith("seconds") else {"joules": "J"}.get(name, "")


def metric_format(key: str) -> Callable[[float], str]:
    """The function that writes values of the metric ``key`` with its unit."""
    formats: dict[str, Callable[[float], str]] = {
        "B": human_bytes,
        "J": lambda value: with_prefix(value, "J"),
        "%": lambda value: f"{100 * value:.1f} %",
        "s": human_seconds,
        "count": _count,
    }
    return formats.get(_unit(key), _three_decimals)


def tick_format(key: str) -> Callable[[float], str]:
    """The same for ticks of an axis, without trailing zeros."""
    unit = _unit(key)
    if unit in ("B", "J"):
        return lambda value: with_prefix(value, unit, digits=".6g") if value else "0"
    if unit == "%":
        return lambda value: f"{100 * value:.6g} %"
    return lambda value: f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:,.6g}"


def format_metric(key: str, value: float | None) -> str:
    """``value`` as ``metric_format(key)`` writes it; empty where it is None."""
    return "" if value is None else metric_format(key)(value)
