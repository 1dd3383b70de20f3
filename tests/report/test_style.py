"""The colours of the pages by numbers: contrast, and distances with the common colour blindnesses.

Protanopia and deuteranopia by the matrices of Machado, Oliveira and Fernandes (2009) at severity 1,
on linear RGB; distances in CIE L*a*b* (1976), contrast by WCAG 2.
"""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest

from flexlora.report.style import DARK, LIGHT

SIGHTS = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
}
XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)
BEFORE = ("#2a78d6", "#d95f21", "#138a5f", "#4a3aa7", "#c2307a", "#8a6d00", "#006d77", "#a33b32")


def linear(colour):
    """Linear RGB ``[3]`` of ``#rrggbb``."""
    c = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(colour, sight):
    t = XYZ @ np.clip(SIGHTS[sight] @ linear(colour), 0, 1) / XYZ.sum(axis=1)
    x, y, z = np.where(t > 216 / 24389, np.cbrt(t), (24389 / 27 * t + 16) / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def closest(colours, sight):
    """The smallest distance between two of the colours."""
    seen = [lab(colour, sight) for colour in colours]
    return min(float(np.linalg.norm(a - b)) for a, b in combinations(seen, 2))


def contrast(one, other):
    high, low = sorted((XYZ[1] @ linear(c) + 0.05 for c in (one, other)), reverse=True)
    return high / low


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
class TestPalette:
    @pytest.mark.parametrize("sight", SIGHTS)
    def test_series_are_distinct(self, palette, sight):
        """The first four, which most charts need, from afar; 2.3 is the least that is seen."""
        assert closest(palette.series, sight) > 20
        assert closest(palette.series[:4], sight) > 35

    @pytest.mark.parametrize("sight", SIGHTS)
    def test_the_steps_of_a_heat_map_differ_in_lightness(self, palette, sight):
        light = [lab(colour, sight)[0] for colour in palette.heat]
        steps = [b - a for a, b in pairwise(light)]
        assert all(abs(step) > 5 for step in steps)
        assert len({step > 0 for step in steps}) == 1

    def test_marks_and_words_stand_out_from_what_lies_behind(self, palette):
        for ground in (palette.ground, palette.card):
            assert all(contrast(colour, ground) >= 3 for colour in palette.series)
            assert contrast(palette.ink, ground) >= 7 and contrast(palette.soft, ground) >= 4.5


def test_a_palette_that_is_not_safe_would_be_seen():
    assert closest(BEFORE, "normal") > 30 and closest(BEFORE, "protanopia") < 5
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
