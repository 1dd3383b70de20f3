"""Bytes and seconds as text."""

from __future__ import annotations

import pytest

from flexlora.errors import UserError
from flexlora.units import human_bytes, human_seconds, parse_bytes, with_prefix


@pytest.mark.parametrize(
    ("text", "count"),
    [("8GiB", 8 * 2**30), ("64 MiB", 64 * 2**20), ("1.5gb", 1_500_000_000), ("500kB", 500_000)],
)
def test_sizes_are_read_with_their_unit(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["8", "8G", "GiB", "-1GB", "8 GiB now", "nanGB", "0GiB"])
def test_a_size_without_a_unit_is_refused(text):
    with pytest.raises(
        UserError, match=f"--keep is '{text}', expected a number and a unit, like 8G"
    ):
        parse_bytes(text, "--keep")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (999.96e3, "1.0 MB"), (-2500, "-2.5 kB"), (1.5e15, "1.5 PB")],
)
def test_bytes_are_written_in_powers_of_1000(count, text):
    assert human_bytes(count) == text


def test_a_whole_number_below_the_first_prefix_has_no_decimals():
    assert [with_prefix(v, "J") for v in (5.0, 5.25, 15_234.0)] == ["5 J", "5.2 J", "15.2 kJ"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (0.00032, "0.00032 s"),
        (599.96, "600.0 s"),
        (600, "10.0 min"),
        (7200, "2.0 h"),
        (86_400, "24.0 h"),
        (3 * 86_400, "3.0 days"),
    ],
)
def test_seconds_are_written_in_the_unit_that_keeps_them_short(seconds, text):
    assert human_seconds(seconds) == text
