"""How numbers are spelled, in a terminal and on a page alike."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["SCORES", "TOTALS", "setting", "spelled", "spelling", "tick_spelling", "with_prefix"]

# Metrics of a table by the words of its header: scores of one round, and sums over all of them.
SCORES = {"eval_loss": "loss", "eval_exact_match": "exact match", "eval_rouge_l": "ROUGE-L"}
TOTALS = {
    "bytes_down": "down",
    "bytes_up": "up",
    "seconds": "seconds",
    "simulated_seconds": "simulated",
    "joules": "joules",
    "clients_failed": "failures",
}
_PREFIXES = ("", "k", "M", "G", "T", "P")


def setting(value: object) -> str:
    """A value of the configuration as ``--set`` takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return "(empty)" if value == "" else str(value)


def plain(value: float) -> str:
    """A whole number as such, any other with two decimals."""
    return str(int(value)) if float(value).is_integer() else f"{value:.2f}"


def fixed(value: float) -> str:
    """A loss or a share with three decimals, and two digits of what would read 0.00."""
    small = 0 < abs(value) < 0.01
    return f"{value:.2g}" if small else f"{value:.3f}"


def percent(value: float) -> str:
    """A share of 1 with one decimal: ``99.8 %``."""
    return f"{100 * value:.1f} %"


def with_prefix(value: float, unit: str) -> str:
    """``1234567`` of ``B`` as ``1.2 MB`` (powers of 1000)."""
    power, largest = 0, len(_PREFIXES) - 1
    while round(abs(value), 1) >= 1000 and power < largest:
        value, power = value / 1000, power + 1
    whole = power == 0 and (unit == "B" or float(value).is_integer())
    return f"{value:.{0 if whole else 1}f} {_PREFIXES[power]}{unit}"


def hours(seconds: float) -> str:
    """Seconds, minutes beyond ten of them, hours beyond two of those."""
    if seconds < 600:
        return f"{seconds:.2g} s" if 0 < seconds < 0.1 else f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def spelling(key: str) -> Callable[[float], str]:
    """The function that spells the values of a metric, by what its name says of the unit."""
    name = key.partition("/")[0]
    if "bytes" in name:
        return lambda value: with_prefix(value, "B")
    if name.endswith("seconds"):
        return hours
    if name == "joules":
        return lambda value: with_prefix(value, "J")
    if name.endswith("energy") or name == "energy_kept":
        return percent
    return plain if name.startswith(("clients", "round", "rank", "rows")) else fixed


def tick_spelling(key: str) -> Callable[[float], str]:
    """The same for the round values of an axis, which need no more digits than they have."""
    name = key.partition("/")[0]
    if "bytes" in name:
        return lambda value: _tick_with_prefix(value, "B")
    if name == "joules":
        return lambda value: _tick_with_prefix(value, "J")
    if name.endswith("energy") or name == "energy_kept":
        return lambda value: f"{100 * value:.6g} %"
    return lambda value: f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:,.6g}"


def _tick_with_prefix(value: float, unit: str) -> str:
    power = 0
    while abs(value) >= 1000 and power < len(_PREFIXES) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.6g} {_PREFIXES[power]}{unit}" if value else "0"


def spelled(key: str, value: float | None) -> str:
    """``value`` in the words of ``key``, and nothing for a number that is not there."""
    return "" if value is None else spelling(key)(value)
