"""The figure of the README: which part of the gap each method closes, and what it sends.

    python docs/figures.py        writes docs/methods.svg from the records of the experiments

For each method, the mean over seeds of (loss of everybody at rank 2 - its loss) / (mean gap to
everybody at rank 16), with the deviation over seeds as a thin line. The same numbers give the same
bytes. No library is needed.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "simulations" / "experiments" / "records" / "methods.json"
FIGURE = HERE / "methods.svg"

WEAK, STRONG = "everybody at rank 2", "everybody at rank 16"
# `aligned, one restart` was measured with an option that no longer exists.
LEFT_OUT = ("the base, untrained", "aligned, one restart")
OURS = ("carried", "aligned", "basis", "residual")

WIDTH, ROW, TOP, LABELS, NUMBERS = 820, 21, 58, 224, 190
LOW, HIGH = -7.2, 1.5
BLUE, GREY, DARK, FAINT = "#2a6fbb", "#b8bec6", "#333a42", "#e3e6ea"


def gap_closed(rows: list[dict]) -> list[tuple[str, float, float, float]]:
    """``(title, mean, deviation, megabytes down)`` of every method, the best first."""
    losses: dict[str, dict[int, float]] = {}
    megabytes: dict[str, list[float]] = {}
    for row in rows:
        if row["variant"] not in LEFT_OUT:
            losses.setdefault(row["variant"], {})[row["seed"]] = row["loss"]
            megabytes.setdefault(row["variant"], []).append(row["MB down"])
    gap = statistics.fmean(losses[WEAK][seed] - losses[STRONG][seed] for seed in losses[WEAK])
    closed = []
    for title, by_seed in losses.items():
        shares = [(losses[WEAK][seed] - loss) / gap for seed, loss in by_seed.items()]
        mean, deviation = statistics.fmean(shares), statistics.stdev(shares)
        closed.append((title, mean, deviation, statistics.fmean(megabytes[title])))
    return sorted(closed, key=lambda row: -row[1])


def x_of(value: float) -> float:
    """The horizontal position of a share of the gap, within the picture."""
    share = (min(max(value, LOW), HIGH) - LOW) / (HIGH - LOW)
    return round(LABELS + share * (WIDTH - LABELS - NUMBERS), 1)


def text(x: float, y: float, words: str, *, anchor: str = "start", extra: str = "") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}"{extra}>{words}</text>'


def bar(place: int, title: str, mean: float, deviation: float, down: float) -> list[str]:
    """One method: its name, its bar from zero, the deviation, and the numbers on the right."""
    y = TOP + place * ROW
    colour = DARK if title in (WEAK, STRONG) else BLUE if title.startswith(OURS) else GREY
    left, right = sorted((x_of(0), x_of(mean)))
    ends = x_of(mean - deviation), x_of(mean + deviation)
    middle, base = y + ROW / 2 - 1, y + 14
    return [
        text(LABELS - 8, base, title, anchor="end"),
        f'<rect x="{left}" y="{y + 3}" width="{round(right - left, 1)}" height="13" '
        f'fill="{colour}"/>',
        f'<line x1="{ends[0]}" x2="{ends[1]}" y1="{middle}" y2="{middle}" stroke="{DARK}"/>',
        text(WIDTH - NUMBERS + 96, base, f"{mean:.2f} ± {deviation:.2f}", anchor="end"),
        text(WIDTH - 8, base, f"{down:.0f} MB", anchor="end"),
    ]


def figure(rows: list[dict]) -> str:
    """The picture as SVG."""
    closed = gap_closed(rows)
    height = TOP + ROW * len(closed) + 34
    bold = ' font-weight="bold"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="sans-serif" font-size="12" fill="{DARK}">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        text(
            8, 20, "Gap in loss closed between all clients at rank 2 and all at rank 16", extra=bold
        ),
        text(8, 40, "Mean of three seeds, 24 clients, 80 % of them at rank 2; higher is better"),
        text(WIDTH - NUMBERS + 96, 40, "gap closed", anchor="end", extra=bold),
        text(WIDTH - 8, 40, "sent down", anchor="end", extra=bold),
    ]
    bottom = TOP + ROW * len(closed)
    for tick in range(int(LOW), int(HIGH) + 1):
        x, colour = x_of(tick), DARK if tick == 0 else FAINT
        lines.append(f'<line x1="{x}" x2="{x}" y1="{TOP}" y2="{bottom}" stroke="{colour}"/>')
        lines.append(text(x, bottom + 16, str(tick), anchor="middle"))
    for place, row in enumerate(closed):
        lines += bar(place, *row)
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    found = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    FIGURE.write_text(figure(found), encoding="utf-8")
    print(f"wrote {FIGURE}")
