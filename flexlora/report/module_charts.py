"""The global change module by module: heat maps over rounds, and singular spectra."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median

from flexlora.report.charts import Chart, Series, drawn, with_points
from flexlora.report.formats import metric_format
from flexlora.report.heat_map import HeatMap, kind_of
from flexlora.report.markup import Markup
from flexlora.report.records import RunRecords, finite
from flexlora.report.style import NUM_STYLES

__all__ = ["module_figures"]

FEW_ROUNDS = 4


def module_figures(run: RunRecords) -> list[list[Markup]]:
    """A row of heat maps and one of spectra; none for a run that has not recorded them."""
    modules = run.modules()
    if not modules:
        return []
    maps = [heat.drawn() for heat in _heat_maps(run, modules)]
    spectra = [_spectra_by_kind(modules[-1]), _spectra_by_round(modules)]
    return [maps, [drawn(chart) for chart in spectra if chart is not None]]


Modules = Sequence[tuple[int, Mapping[str, Mapping[str, object]]]]


def _heat_maps(run: RunRecords, modules: Modules) -> list[HeatMap]:
    """The energy that the smallest rank keeps, and the effective rank."""
    smallest = run.rank_classes[0] if run.rank_classes else ""
    return [
        HeatMap(
            key="energy-by-module",
            title=f"Energy in T_r(G) at {smallest}",
            subtitle="share of a module's change within the smallest rank",
            metric="energy_kept",
            columns=_columns(modules, f"energy_kept/{smallest}"),
        ),
        HeatMap(
            key="rank-by-module",
            title="Effective rank by module",
            subtitle="of the module's global change",
            metric="effective_rank",
            columns=_columns(modules, "effective_rank"),
        ),
    ]


def _columns(modules: Modules, key: str) -> list[tuple[int, dict[str, float]]]:
    columns = []
    for at, of_round in modules:
        values = {name: finite(row.get(key)) for name, row in of_round.items()}
        columns.append((at, {name: v for name, v in values.items() if v is not None}))
    return [column for column in columns if column[1]]


def _spectra_by_kind(last: tuple[int, Mapping[str, Mapping[str, object]]]) -> Chart | None:
    """A line per kind of module: the median over its layers, in the last round."""
    at, modules = last
    kinds: dict[str, list[dict[int, float]]] = {}
    for module, row in modules.items():
        kinds.setdefault(kind_of(module), []).append(_spectrum(row))
    shown = list(kinds.items())[:NUM_STYLES]
    rest = f"; {len(kinds) - len(shown)} more kinds are left out" if len(kinds) > len(shown) else ""
    return _chart(
        "spectra-by-module",
        f"Singular values after round {at}",
        f"of the global change, median over layers{rest}",
        {kind: _medians(spectra) for kind, spectra in shown},
    )


def _spectra_by_round(modules: Modules) -> Chart | None:
    """A line for a few rounds, from the first to the last: the median over all modules."""
    last = len(modules) - 1
    chosen = sorted({round(k * last / (FEW_ROUNDS - 1)) for k in range(FEW_ROUNDS)})
    lines = {
        f"after round {modules[k][0]}": _medians([_spectrum(r) for r in modules[k][1].values()])
        for k in chosen
    }
    title, subtitle = "Singular values over rounds", "median over all modules"
    return _chart("spectra-by-round", title, subtitle, lines)


def _spectrum(row: Mapping[str, object]) -> dict[int, float]:
    """``{direction: singular value}`` of those above zero, as far as they are recorded."""
    found = row.get("spectrum")
    if not isinstance(found, Mapping):
        return {}
    pairs = {int(at): finite(v) for at, v in found.items() if str(at).isdecimal()}
    return {at: v for at, v in pairs.items() if v and v > 0 and at > 0}


def _medians(spectra: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """By direction, over the modules that have it; only directions that most of them have."""
    directions = sorted({at for spectrum in spectra for at in spectrum})
    values = {at: [s[at] for s in spectra if at in s] for at in directions}
    return {at: median(v) for at, v in values.items() if 2 * len(v) > len(spectra)}


def _chart(
    key: str, title: str, subtitle: str, lines: Mapping[str, Mapping[int, float]]
) -> Chart | None:
    """Both axes logarithmic; None without a value."""
    series = with_points(
        Series(
            name=name,
            points=tuple((math.log2(at), math.log10(value)) for at, value in line.items()),
            style=style,
        )
        for style, (name, line) in enumerate(lines.items())
    )
    if not series:
        return None
    ys = [y for line in series for _, y in line.points]
    low, high = min(ys), max(ys)
    exact = metric_format("singular_value")
    return Chart(
        key=key,
        title=title,
        subtitle=subtitle,
        series=series,
        shown=lambda value: exact(10**value),
        tick=lambda value: f"{float(f'{10**value:.2g}'):g}",
        x_name="direction",
        x_tick=lambda value: f"{2**value:.0f}",
        y_span=(low, high if high > low else low + 1),
    )
