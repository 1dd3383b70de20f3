"""The charts of one run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from flexlora.report.charts import Chart, Series, with_points
from flexlora.report.formats import metric_format, tick_format
from flexlora.report.records import RunRecords

__all__ = [
    "CHARTS",
    "PERSONAL_CHARTS",
    "PRIVACY_CHARTS",
    "charts_of",
    "clients_chart",
    "failures_chart",
]

MANY_BARS = 24
ChartMaker = Callable[[RunRecords], Chart | None]


def by_round(
    title: str, *named: tuple[str, str], subtitle: str = "", bars: bool = False, needs: str = ""
) -> ChartMaker:
    """A line by round per ``(name, metric)``; ``metric/*`` is a line per rank class.

    The chart is None for a run without these metrics or without ``needs``. ``bars`` draws bars for
    runs of at most ``MANY_BARS`` rounds.
    """

    def chart(run: RunRecords) -> Chart | None:
        if needs and not run.points(needs):
            return None
        lines: list[tuple[str, str]] = []
        for name, key in named:
            classes = [(name, key.replace("*", name)) for name in run.rank_classes]
            lines += classes if key.endswith("/*") else [(name, key)]
        series = with_points(
            Series(name=name, points=tuple(run.points(key)), style=place)
            for place, (name, key) in enumerate(lines)
        )
        if not series:
            return None
        key = named[0][1]
        few = bars and 1 <= run.last_round <= MANY_BARS
        return Chart(
            key=title.lower().replace(" ", "-"),
            title=title,
            subtitle=subtitle,
            series=series,
            shown=metric_format(key),
            tick=tick_format(key),
            bars=few,
            x_span=(1 if few else 0, run.last_round),
            y_span=(0.0, 1.0) if key.startswith("eval_exact_match") else None,
        )

    return chart


def _personal(title: str, metric: str, subtitle: str = "") -> ChartMaker:
    personal = f"{metric}/personal"
    global_line = ("global, same clients", f"{metric}/global_of_personal")
    return by_round(
        title,
        global_line,
        ("with its own factors", personal),
        needs=personal,
        subtitle=subtitle,
    )


def _truncated_energy(run: RunRecords) -> Chart | None:
    """None where every class is sent its ``T_r(G)`` and nothing more: "Energy kept" shows that."""
    keys = [(f"truncated_energy/{c}", f"energy_kept/{c}") for c in run.rank_classes]
    alike = all(
        abs(value - whole.get(at, value)) < 1e-9
        for key, sent in keys
        for whole in [dict(run.points(sent))]
        for at, value in run.points(key)
    )
    title, subtitle = (
        "Energy of T_r alone",
        "share within the trained rank, without what is carried",
    )
    return None if alike else by_round(title, ("", "truncated_energy/*"), subtitle=subtitle)(run)


_ROWS = "share of the held-out rows"
CHARTS: tuple[ChartMaker, ...] = (
    by_round(
        "Held-out loss",
        ("", "eval_loss/*"),
        subtitle="each rank class's adapter on the rows of all clients",
    ),
    by_round("Exact match of generated answers", ("", "eval_exact_match/*"), subtitle=_ROWS),
    by_round("Training loss", ("training loss", "train_loss"), subtitle="mean over the examples"),
    by_round(
        "Bytes of training",
        ("down", "bytes_down"),
        ("up", "bytes_up"),
        subtitle="from the server to the clients, and back",
        bars=True,
    ),
    by_round(
        "Energy kept",
        ("", "energy_kept/*"),
        subtitle="share of the global change that a class is given",
    ),
    _truncated_energy,
    by_round(
        "Effective rank", ("effective rank", "effective_rank"), subtitle="of the global change"
    ),
    by_round(
        "Factor gap",
        ("factor gap", "factor_gap"),
        subtitle="how far averaged factors would be from the averaged products",
    ),
    by_round(
        "Seconds",
        ("whole round", "seconds"),
        ("the server's part", "server_seconds"),
        subtitle="on the machine that ran this",
    ),
    by_round(
        "Simulated seconds",
        ("simulated seconds", "simulated_seconds"),
        subtitle="on the simulated devices and links",
    ),
    by_round("Joules", ("joules", "joules"), subtitle="on the simulated devices"),
)

PRIVACY_CHARTS: tuple[ChartMaker, ...] = (
    by_round(
        "Epsilon",
        ("epsilon", "epsilon"),
        ("median of the clients", "epsilon_median"),
        subtitle="of the adapters, or the largest of a client's, at privacy.delta",
    ),
    by_round(
        "Clip norm", ("clip norm", "clip"), subtitle="of a client's change, all modules together"
    ),
)

PERSONAL_CHARTS: tuple[ChartMaker, ...] = (
    _personal("Held-out loss of each client", "eval_loss"),
    _personal("Exact match of each client", "eval_exact_match", _ROWS),
)


def charts_of(run: RunRecords, makers: Iterable[ChartMaker]) -> list[Chart]:
    """The charts for whose metrics this run has numbers."""
    return [chart for maker in makers if (chart := maker(run)) is not None]


def clients_chart(run: RunRecords) -> Chart | None:
    """Sorted held-out losses of the clients, at the base and after the last evaluation."""
    evaluated = sorted({int(row["round"]) for row in run.evaluations})
    series = []
    for place, at in enumerate(dict.fromkeys([*evaluated[:1], *evaluated[-1:]])):
        losses = sorted(run.client_loss(at).values())
        points = tuple((float(order), loss) for order, loss in enumerate(losses, start=1))
        name = "base" if at == 0 else f"after round {at}"
        series.append(Series(name=name, points=points, style=place))
    shown = tuple(line for line in with_points(series) if len(line.points) > 1)
    if not shown:
        return None
    return Chart(
        key="clients",
        title="Held-out loss, client by client",
        subtitle="at its own rank, sorted from the lowest to the highest",
        series=shown,
        shown=metric_format("eval_loss"),
        tick=tick_format("eval_loss"),
        x_name="client",
    )


def failures_chart(run: RunRecords) -> Chart | None:
    """Trainings that did not count, by round and status; None without any."""
    counts = Counter((row["status"], int(row["round"])) for row in run.clients)
    statuses = [*dict.fromkeys(status for status, at in counts if status != "ok" and at > 0)]
    rounds = range(1, run.last_round + 1)
    series = tuple(
        Series(
            name=status,
            points=tuple((float(at), float(counts[status, at])) for at in rounds),
            style=place,
        )
        for place, status in enumerate(statuses)
    )
    if not series or not rounds:
        return None
    return Chart(
        key="failures",
        title="Trainings that did not count",
        subtitle="by round",
        series=series,
        shown=metric_format("clients"),
        tick=tick_format("clients"),
        bars=run.last_round <= MANY_BARS,
        x_span=(1, run.last_round),
    )
