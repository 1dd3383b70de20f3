"""What a private run has spent, and of whom its epsilon speaks."""

from __future__ import annotations

from flexlora.report.charts import Chart, drawn
from flexlora.report.formats import format_setting
from flexlora.report.markup import Markup, data, element, joined, table, text
from flexlora.report.records import RunRecords
from flexlora.report.run_charts import PRIVACY_CHARTS, charts_of

__all__ = ["privacy_spent"]

NOISE = "the server clips each client's change and adds noise to the sum"
MASKED = "the server learns sums of a round, and no single update"
MEANS = {
    "central": f"{NOISE}. Epsilon is of a client's whole part, towards who sees the adapters.",
    "secure": f"{MASKED}. No noise is added, so that no epsilon bounds what the sums tell.",
    "secure+central": f"{MASKED}; {NOISE.replace('the server', 'it')}. Epsilon is of a client's "
    "whole part, towards who sees the adapters.",
    "local": "each client adds noise before anything leaves it. Epsilon is each client's own.",
    "example": "clients train by DP-SGD. Epsilon is of one row, each client's own.",
}
SETTINGS: tuple[str, ...] = (
    "sampling.policy",
    "fraction-train",
    "privacy.clip",
    "privacy.clip-quantile",
)
SETTINGS += ("privacy.noise-multiplier", "privacy.delta", "privacy.epsilon", "privacy.min-group")
SPENT = (
    ("epsilon", "epsilon spent"),
    ("epsilon_median", "its median over the clients"),
    ("as_if_clients", "as if so many clients took part"),
    ("clip", "clip norm of the last round"),
    ("clipped_share", "share of the updates that were clipped"),
)


def privacy_spent(run: RunRecords) -> list[Markup]:
    """A sentence, a table and the charts; nothing for a run without a privacy mode."""
    mode = str(run.setting("privacy.mode"))
    if mode == "none":
        return []
    meaning = MEANS.get(mode, "")
    about = f"privacy.mode={mode}: {meaning} Held-out scores are reported without noise."
    rows = []
    for key, title in SPENT:
        if end := run.last(key):
            rows.append([text(f"{title}, after round {end[0]}"), data(end[1], _shown(key, end[1]))])
    unused = {"privacy.min-group"} if not mode.startswith("secure") else set[str]()
    unused |= {"privacy.delta"} if mode == "secure" else set()
    for key in SETTINGS:
        value = run.setting(key)
        if value and key not in unused:
            rows.append([element("code", text(key)), text(format_setting(value))])
    charts: list[Chart] = charts_of(run, PRIVACY_CHARTS)
    figures = element("div", joined(drawn(chart) for chart in charts), class_="figures")
    return [
        element("p", text(about)),
        table(["what", "value"], rows, caption="Privacy spent"),
        figures if charts else Markup(""),
    ]


def _shown(key: str, value: float) -> str:
    if key == "clipped_share":
        return f"{100 * value:.0f} %"
    return f"{value:,.0f}" if key == "as_if_clients" else f"{value:.4g}"
