"""Heat maps and spectra of modules: what a cell says, and what a run without them has."""

from __future__ import annotations

import re

from flexlora.report import write_report
from flexlora.report.heat_map import MOST_COLUMNS, HeatMap, ordered
from pages import Page, read_page, written_run

LAYERS = [f"model.layers.{layer}.{kind}" for layer in (0, 1, 2, 10) for kind in ("q", "v")]


def heat_map(columns, metric="effective_rank"):
    given = {"key": "k", "title": "a title", "subtitle": "", "metric": metric}
    return Page(HeatMap(columns=columns, **given).drawn())


def cells(page):
    rects = [a for tag, a in page.elements if tag == "rect"]
    return [a for a in rects if a["height"] != "12"]  # those of the legend


def test_a_cell_names_its_module_its_rounds_and_its_value():
    page = heat_map([(1, {"a.q": 1.0, "b.q": 3.0}), (2, {"a.q": 1.01, "b.q": 2.0})])
    said = page.said("title")
    assert "a.q, round 1 to 2: 1.000 to 1.010" in said  # of one step
    assert {"b.q, round 1: 3.000", "b.q, round 2: 2.000"} <= {*said}
    assert page.said("desc") == ["q: 1.000 to 3.000 in round 1, 1.010 to 2.000 in round 2."]
    assert [value for value, *_ in page.data] == [1.0, 3.0]


def test_layers_go_down_within_a_kind():
    assert ordered(LAYERS) == [f"model.layers.{k}.{kind}" for kind in "qv" for k in (0, 1, 2, 10)]


def test_many_rounds_of_many_modules_stay_small():
    modules = [f"layers.{layer}.{kind}" for layer in range(32) for kind in "abcdefg"]
    columns = [
        (at, {m: (at * 7919 + k) % 101 / 101 for k, m in enumerate(modules)}) for at in range(500)
    ]
    page = heat_map(columns)
    places = {float(cell["x"]) for cell in cells(page)}
    assert len(places) == MOST_COLUMNS
    heights = [float(a["viewbox"].split()[3]) for _, a in page.elements if "viewbox" in a]
    assert max(heights) < 500


def test_equal_values_and_a_missing_module_have_a_picture():
    page = heat_map([(1, {"a.q": 2.0}), (2, {"a.q": 2.0, "b.q": 2.0})])
    assert "a.q, round 1 to 2: 2.000" in page.said("title")
    assert "b.q, round 2: 2.000" in page.said("title")
    assert HeatMap(key="k", title="t", subtitle="", metric="m", columns=[(1, {})]).drawn() == ""


def of_modules(scale):
    return {
        name: {"effective_rank": 2.0, "energy_kept/rank_2": 0.5, "spectrum": spectrum}
        for name, spectrum in (
            ("layers.0.q", {"1": 4.0 * scale, "2": 1.0 * scale}),
            ("layers.1.q", {"1": 2.0 * scale, "2": 0.5 * scale}),
            ("layers.0.v", {"1": 1.0 * scale, "2": 0.0}),
        )
    }


def test_spectra_are_medians_by_kind_and_by_round(tmp_path):
    extra = {at: {"modules": of_modules(at)} for at in (1, 2)}
    page = read_page(write_report(written_run(tmp_path / "run", (3.0, 2.0, 1.0), extra=extra)))
    said = page.said("title")
    assert {"q, direction 1: 6.000", "q, direction 2: 1.500", "v, direction 1: 2.000"} <= {*said}
    assert {"after round 1, direction 1: 2.000", "after round 2, direction 1: 4.000"} <= {*said}
    assert not any(re.match("v, direction 2", text) for text in said)  # log of zero
    assert "Module by module" in page.said("h2")


def test_a_run_of_an_older_version_has_no_spectra(tmp_path):
    old = {"q": {"rank": 2, "effective_rank": 2.0, "energy_kept/rank_2": 0.5}}
    folder = written_run(tmp_path / "run", (3.0, 2.0), extra={1: {"modules": old}})
    page = read_page(write_report(folder))
    assert "Effective rank by module" in page.said("figcaption")
    assert not any("Singular" in text for text in page.said())
    plain = read_page(write_report(written_run(tmp_path / "plain", (3.0, 2.0))))
    assert "Module by module" not in plain.said("h2")
