"""Verdicts are made of numbers: they turn when the numbers do, and say by how much."""

import math

import pytest

from flexlora.report.console import make_console
from flexlora.simulations.experiments.checks import Check, print_verdict


@pytest.mark.parametrize(
    ("sense", "seen", "holds"),
    [
        ("is", 1.1, True),
        ("is", 0.9, True),
        ("is", 1.2, False),
        ("is", 0.8, False),
        ("at least", 5.0, True),
        ("at least", 0.9, True),
        ("at least", 0.8, False),
        ("at most", -5.0, True),
        ("at most", 1.1, True),
        ("at most", 1.2, False),
        ("at least", math.nan, False),
        ("at most", math.nan, False),
        ("is", math.inf, False),
        ("more than", 0.9, True),
        ("more than", 0.8, False),
        ("more than", math.nan, False),
        ("more than", math.inf, False),
    ],
)
def test_a_check_turns_with_its_number(sense, seen, holds):
    check = Check(claim="it is so", expected=1.0, seen=seen, tolerance=0.1001, sense=sense)
    assert check.holds is holds
    assert ("DOES NOT HOLD" in check.sentence()) is not holds


@pytest.mark.parametrize("sense", ["is", "at least", "at most", "more than"])
@pytest.mark.parametrize("missing", [math.nan, math.inf, -math.inf])
def test_nothing_holds_against_a_figure_that_is_not_there(sense, missing):
    for seen in (-5.0, 0.1, 5.0, missing):
        check = Check(claim="it is so", expected=missing, seen=seen, tolerance=9.0, sense=sense)
        assert not check.holds and check.sentence().endswith(": DOES NOT HOLD.")


def test_more_than_is_not_met_by_the_figure_itself():
    assert Check(claim="", expected=1.0, seen=1.0, sense="at least").holds
    assert not Check(claim="", expected=1.0, seen=1.0, sense="more than").holds
    assert Check(claim="", expected=1.0, seen=1.001, sense="more than").holds
    assert not Check(claim="", expected=1.0, seen=0.5, tolerance=0.5, sense="more than").holds


def test_a_sentence_says_what_was_expected_what_was_seen_and_by_how_much():
    check = Check(claim="a keeps", expected=0.2, seen=0.5, tolerance=0.1)
    sentence = "a keeps: expected 0.2, seen 0.5: DOES NOT HOLD, 0.2 beyond the tolerance of 0.1."
    assert check.sentence() == sentence
    close = Check(claim="a keeps", expected=0.2, seen=0.25, tolerance=0.1)
    assert close.sentence().endswith("seen 0.25: holds within the tolerance of 0.1.")
    exact = Check(claim="a keeps", expected=0.2, seen=0.3, sense="at least")
    assert exact.sentence() == "a keeps: expected at least 0.2, seen 0.3: holds."
    expected = "sense is 'about', expected one of is, at least, at most, more than"
    with pytest.raises(ValueError, match=expected):
        Check(claim="", expected=0.0, seen=0.0, sense="about")


def test_a_small_run_judges_only_what_is_true_at_any_size(capsys):
    wrong = Check(claim="large", expected=1.0, seen=0.0)
    right = Check(claim="always", expected=1.0, seen=1.0, any_scale=True)
    broken = Check(claim="always", expected=1.0, seen=0.0, any_scale=True)
    console = make_console()
    assert print_verdict([wrong, right], console, scale=1.0) == 1
    assert "1 of 2 expected figures hold." in capsys.readouterr().out
    assert print_verdict([wrong, right], console, scale=0.5) == 0
    out = capsys.readouterr().out
    assert "large: expected 1, seen 0 (not judged at scale 0.5)." in out
    assert (
        "1 of 1 expected figures hold; 1 expected figures are those of scale 1 and were not judged."
        in out
    )
    assert print_verdict([broken, right], console, scale=0.5) == 1
    assert print_verdict([right], console, scale=1.0) == 0
    assert print_verdict([wrong], console, scale=0.5) == 0
    printed = capsys.readouterr().out.splitlines()[-1]
    assert printed == "1 expected figures are those of scale 1 and were not judged."
