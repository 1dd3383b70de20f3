"""The charts of one run: which metrics they show, and over what."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from flexlora.report.charts import Chart, Series, with_points
from flexlora.report.formats import metric_format, tick_format
from flexlora.report.records import RunRecords

__all__ = ["CHARTS", "PERSONAL_CHARTS", "charts_of", "clients_chart"]

MANY_BARS = 24


def by_class(key: str, title: str, subtitle: str = "") -> Callable[[RunRecords], Chart | None]:
    """A line per rank class of ``key/CLASS`` by round."""

    def chart(run: RunRecords) -> Chart | None:
        named = [(name, f"{key}/{name}") for name in run.rank_classes]
        return lines(run, key, title, named, subtitle=subtitle)

    return chart


def of_keys(
    title: str, *named: tuple[str, str], subtitle: str = "", bars: bool = False, needs: str = ""
) -> Callable[[RunRecords], Chart | None]:
    """A line (or, of a short run, bars) per ``(name, key)`` by round; none without ``needs``."""

    def chart(run: RunRecords) -> Chart | None:
        if needs and not run.points(needs):
            return None
        few = bars and 1 <= run.last_round <= MANY_BARS
        return lines(run, named[0][1], title, named, subtitle=subtitle, bars=few)

    return chart


def lines(
    run: RunRecords,
    key: str,
    title: str,
    named: Iterable[tuple[str, str]],
    *,
    subtitle: str = "",
    bars: bool = False,
) -> Chart | None:
    """A series per ``(name, key)`` that the run has numbers of; None where it has none."""
    found = [
        Series(name=name, points=tuple(run.points(own)), style=place)
        for place, (name, own) in enumerate(named)
    ]
    series = with_points(found)
    if not series:
        return None
    return Chart(
        key=title.lower().replace(" ", "-"),
        title=title,
        subtitle=subtitle,
        series=series,
        shown=metric_format(key),
        tick=tick_format(key),
        bars=bars,
        x_span=(1 if bars else 0, run.last_round),
        y_span=(0.0, 1.0) if key.startswith("eval_exact_match") else None,
    )


CHARTS: tuple[Callable[[RunRecords], Chart | None], ...] = (
    by_class("eval_loss", "Held-out loss", "each rank class's adapter on the rows of all clients"),
    by_class("eval_exact_match", "Exact match of generated answers", "share of the held-out rows"),
    of_keys("Training loss", ("training loss", "train_loss"), subtitle="mean over the examples"),
    of_keys(
        "Bytes of training",
        ("down", "bytes_down"),
        ("up", "bytes_up"),
        subtitle="from the server to the clients, and back",
        bars=True,
    ),
    by_class("energy_kept", "Energy kept", "share of the global change that a class is given"),
    of_keys(
        "Effective rank", ("effective rank", "effective_rank"), subtitle="of the global change"
    ),
    of_keys(
        "Factor gap",
        ("factor gap", "factor_gap"),
        subtitle="how far averaged factors would be from the averaged products",
    ),
    of_keys(
        "Seconds",
        ("whole round", "seconds"),
        ("the server's part", "server_seconds"),
        subtitle="on the machine that ran this",
    ),
    of_keys(
        "Simulated seconds",
        ("simulated seconds", "simulated_seconds"),
        subtitle="on the simulated devices and links",
    ),
    of_keys("Joules", ("joules", "joules"), subtitle="on the simulated devices"),
)

PERSONAL_CHARTS: tuple[Callable[[RunRecords], Chart | None], ...] = (
    of_keys(
        "Held-out loss of each client",
        ("global, same clients", "eval_loss/global_of_personal"),
        ("with its own factors", "eval_loss/personal"),
        needs="eval_loss/personal",
    ),
    of_keys(
        "Exact match of each client",
        ("global, same clients", "eval_exact_match/global_of_personal"),
        ("with its own factors", "eval_exact_match/personal"),
        needs="eval_exact_match/personal",
        subtitle="share of the held-out rows",
    ),
)


def charts_of(
    run: RunRecords, makers: Iterable[Callable[[RunRecords], Chart | None]] = CHARTS
) -> list[Chart]:
    """The charts that this run has numbers for."""
    return [chart for maker in makers if (chart := maker(run)) is not None]


def clients_chart(run: RunRecords) -> Chart | None:
    """Held-out loss client by client, sorted: whether somebody is left behind."""
    evaluated = sorted({int(row["round"]) for row in run.evaluations})
    shown = evaluated[:1] if evaluated[:1] == evaluated[-1:] else [*evaluated[:1], evaluated[-1]]
    series = []
    for place, at in enumerate(shown):
        losses = sorted(run.client_loss(at).values())
        points = tuple((float(order), loss) for order, loss in enumerate(losses, start=1))
        name = "base" if at == 0 else f"after round {at}"
        series.append(Series(name=name, points=points, style=place))
    series = [line for line in with_points(series) if len(line.points) > 1]
    if not series:
        return None
    return Chart(
        key="clients",
        title="Held-out loss, client by client",
        subtitle="at its own rank, sorted from the lowest to the highest",
        series=tuple(series),
        shown=metric_format("eval_loss"),
        tick=tick_format("eval_loss"),
        x_name="client",
    )
