"""Figures of experiments as SVG, by matplotlib (``pip install 'flexlora[figures]'``)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["arms_figure"]

BLUE, GREY, DARK = "#2a6fbb", "#b8bec6", "#333a42"


def arms_figure(
    titles: Sequence[str], rows: Sequence[Mapping], *, key: str, label: str, file: Path
) -> bool:
    """One bar per arm: the mean of ``key`` over seeds, every seed as a dot. False: no matplotlib.

    Baselines and ceilings (arms that are not an aggregation method at unequal ranks) are grey. The
    same rows give the same bytes.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"svg.hashsalt": "flexlora", "font.size": 9})
    values = {title: [row[key] for row in rows if row["arm"] == title] for title in titles}
    shown = [title for title in titles if values[title]]
    figure, axes = pyplot.subplots(figsize=(7.2, 0.34 * len(shown) + 0.9))
    for position, title in enumerate(reversed(shown)):
        reference = title.startswith(("the base", "each client", "everybody", "pooled"))
        mean = statistics.fmean(values[title])
        axes.barh(position, mean, color=GREY if reference else BLUE, height=0.66)
        axes.plot(values[title], [position] * len(values[title]), "o", color=DARK, markersize=3)
        axes.text(max(values[title]) + 0.012, position, f"{mean:.2f}", va="center", color=DARK)
    axes.set_yticks(range(len(shown)), list(reversed(shown)))
    axes.set_xlim(0, 1)
    axes.set_xlabel(label)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    figure.savefig(file, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    return True
