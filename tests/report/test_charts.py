"""Charts as a reader of the picture meets them: a point lies where the axis says it lies."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flexlora.report.axes import Scale, span_of, ticks
from flexlora.report.charts import (
    HEIGHT,
    WIDTH,
    Chart,
    Series,
    drawn,
    on_common_axes,
    with_points,
)
from flexlora.report.formats import format_metric, metric_format, tick_format
from pages import Page

NUMBERS = st.floats(-1e9, 1e9, allow_nan=False).map(lambda value: round(value, 6))


def chart(*lines, key="eval_loss", **changes):
    """A chart of lines given by their values, at rounds 0, 1, ..."""
    series = tuple(
        Series(name=f"line {place}", points=tuple(enumerate(map(float, values))), style=place)
        for place, values in enumerate(lines)
    )
    given = {"key": "key", "title": "a title", "series": series, "shown": metric_format(key)}
    return Chart(**{**given, "tick": tick_format(key), **changes})


def picture(of):
    """The drawn figure: ``(page, levels)``, a level being a tick's height and its label."""
    page = Page(drawn(of))
    labels = [text for path, text in page.texts if path[-1] == "text"]
    places = [a for tag, a in page.elements if tag == "text"]
    levels = [
        (float(a["y"]) - 3.8, float(label.replace(",", "")))
        for a, label in zip(places, labels, strict=True)
        if a["text-anchor"] == "end"
    ]
    return page, levels


def heights(page):
    """The vertical positions of the points of every line."""
    lines = [a["points"] for tag, a in page.elements if tag == "polyline"]
    return [[float(point.split(",")[1]) for point in line.split()] for line in lines]


def read_off(levels, height):
    """The value that the axis gives a height."""
    (y0, v0), (y1, v1) = levels[0], levels[-1]
    return v0 + (height - y0) / (y1 - y0) * (v1 - v0)


@settings(deadline=None)
@given(st.lists(NUMBERS, min_size=1, max_size=12))
@example([1.0, 1 - 2e-16])
@example([0.0, 0.0])
@example([-3.5])
@example([4.07, 3.96, 3.99])
def test_every_point_lies_where_the_axis_says(values):
    page, levels = picture(chart(values))
    (shown,) = heights(page)
    step = levels[1][1] - levels[0][1]
    for value, height in zip(values, shown, strict=True):
        assert 0 <= height <= HEIGHT
        # A tenth of a unit of the picture, and what a tick's six digits leave out.
        rounding = 1e-5 * max(abs(level) for _, level in levels)
        assert read_off(levels, height) == pytest.approx(value, abs=step / 100 + rounding)


@settings(deadline=None)
@given(st.lists(NUMBERS, min_size=1, max_size=8), st.booleans())
def test_ticks_hold_all_values_at_equal_round_steps(values, from_zero):
    span = span_of(values, from_zero=from_zero)
    found = ticks(span)
    steps = [b - a for a, b in pairwise(found)]
    rounding = 1e-8 * steps[0]
    assert found[0] <= min(values) + rounding and max(values) <= found[-1] + rounding
    assert 2 <= len(found) <= 8
    assert steps == pytest.approx([steps[0]] * len(steps), rel=1e-6)
    mantissa = steps[0] / 10.0 ** math.floor(math.log10(steps[0]) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 2, 2.5, 5, 10)) < 1e-3
    assert not from_zero or found[0] <= 0 <= found[-1]


@settings(deadline=None)
@given(st.integers(0, 50), st.integers(1, 3000))
def test_ticks_of_rounds_are_whole_and_inside(first, length):
    found = ticks((first, first + length), whole=True)
    assert all(float(t).is_integer() and first <= t <= first + length for t in found)
    assert 1 <= len(found) <= 6


def test_lines_on_one_another_are_one_line_with_all_names():
    page, _ = picture(chart([3.0, 1.0], [3.0, 1.001], [3.0, 2.0]))
    assert len(heights(page)) == 2
    assert page.said("span") == ["line 0, line 1 (one line)", "line 2"]
    assert "line 0, line 1, round 1: 1.000" in page.said("title")
    page, _ = picture(chart([3.0, 1.0], [3.0, 1.1], [3.0, 2.0]))
    assert len(heights(page)) == 3


def test_rounds_without_a_value_are_bridged_and_a_single_one_is_a_mark():
    sparse = Series(name="sparse", points=((0, 3.0), (4, 1.0)))
    page, _ = picture(chart(series=(sparse,)))
    assert len(heights(page)[0]) == 2
    page, _ = picture(chart([2.0], title="Line 0"))
    assert [tag for tag, _ in page.elements].count("path") == 1 and page.said("span") == []
    page, _ = picture(chart([2.0], title="loss"))
    assert page.said("span") == ["line 0"]
    assert "line 0, round 0: 2.000" in page.said("title")


def test_bars_stand_on_zero_and_are_as_high_as_they_count():
    of = chart([100, 300], [50, 0], key="bytes_up", bars=True)
    page = Page(drawn(of))
    bars = [a for tag, a in page.elements if tag == "rect"]
    tall = [float(a["height"]) for a in bars]
    assert tall[1] == pytest.approx(3 * tall[0], abs=0.05) and tall[3] == 0
    assert tall[0] == pytest.approx(2 * tall[2], abs=0.05)
    assert len({round(float(a["y"]) + float(a["height"]), 1) for a in bars}) == 1
    spans = sorted((float(a["x"]), float(a["x"]) + float(a["width"])) for a in bars)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert spans[0][0] >= 0 and spans[-1][1] <= WIDTH
    assert "line 0, round 1: 300 B" in page.said("title")


def test_charts_on_common_axes_have_the_same_ticks_and_no_others_do():
    charts = [chart([3.0, 1.0]), chart([9.0, 8.0, 7.0])]
    apart = [picture(one)[1] for one in charts]
    together = [picture(one)[1] for one in on_common_axes(charts)]
    assert apart[0] != apart[1] and together[0] == together[1]
    page, levels = picture(on_common_axes(charts)[0])
    assert read_off(levels, heights(page)[0][1]) == pytest.approx(1.0, abs=0.05)


def test_a_loss_that_went_astray_bends_no_axis():
    both = chart([3.0, 1.0], [1e300, -1e300]).series
    page, levels = picture(chart(series=with_points(both)))
    assert max(level for _, level in levels) < 10 and len(heights(page)) == 1


def test_a_ninth_line_is_told_from_the_first_by_its_mark():
    page, _ = picture(chart(*([float(k)] for k in range(9))))
    marks = [(a["class"], a["d"]) for tag, a in page.elements if tag == "path"]
    assert len(set(marks)) == 9


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("eval_loss", 0.1154, "0.115"),
        ("eval_loss", 0.00012, "0.00012"),
        ("bytes_down", 999_960, "1.0 MB"),
        ("bytes_down", 12, "12 B"),
        ("eval_bytes_down", 1.5e15, "1.5 PB"),
        ("simulated_seconds", 599.96, "600.0 s"),
        ("server_seconds", 61.0, "61.0 s"),
        ("seconds", 0.00032, "0.00032 s"),
        ("seconds", 1500.0, "25.0 min"),
        ("seconds", 86_400.0, "24.0 h"),
        ("energy_kept/rank_8", 0.9984, "99.8 %"),
        ("joules", 15_234.0, "15.2 kJ"),
        ("clients_failed", 3, "3"),
        ("eval_loss", None, ""),
    ],
)
def test_numbers_are_spelled_by_their_unit(key, value, words):
    assert format_metric(key, value) == words


def test_labels_of_an_axis_have_no_more_digits_than_they_need():
    byte, share = tick_format("bytes_up"), tick_format("energy_kept/rank_2")
    assert [byte(v) for v in (0.0, 2.5e6, 1e7)] == ["0", "2.5 MB", "10 MB"]
    assert [share(v) for v in (0.9975, 1.0)] == ["99.75 %", "100 %"]
    assert [tick_format("seconds")(v) for v in (0.5, 2500.0, 20000.0)] == [
        "0.5",
        "2,500",
        "20,000",
    ]


def test_a_scale_maps_the_ends_of_its_span_to_its_ends():
    scale = Scale(span=(1.0, 3.0), start=10.0, end=0.0)
    assert (scale(1.0), scale(2.0), scale(3.0)) == (10.0, 5.0, 0.0)


def test_a_description_names_every_line_from_its_first_to_its_last_value():
    (said,) = Page(drawn(chart([3.0, 1.0], [2.0, 2.5]))).said("desc")
    assert re.sub(r"\s+", " ", said) == (
        "line 0: 3.000 at round 0, 1.000 at round 1. line 1: 2.000 at round 0, 2.500 at round 1."
    )
