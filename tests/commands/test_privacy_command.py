"""``flexlora privacy``: the table, the noise for a budget, the page, bad input."""

from __future__ import annotations

import re

import pytest

from flexlora.commands.cli import main

FEDERATION = ("--clients", "1613", "--sample", "0.0496", "--rounds", "50", "--delta", "1e-5")


def cells(capsys, *arguments):
    """``{sampling: cells of its row}`` of the printed table, and all that was printed."""
    assert main(["privacy", *arguments]) == 0
    text = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]
    return {row[0]: row[1:] for row in rows if row}, text


def test_the_table_has_epsilon_for_each_way_of_sampling(capsys):
    table, text = cells(capsys, *FEDERATION, "--noise", "1")
    assert table == {
        "Poisson": ["1", "2.651", "a client joins or leaves"],
        "fixed size": ["1", "22.02", "a client is replaced"],
        "no amplification": ["1", "54.38", "a client joins or leaves"],
    }
    assert "1,613 clients, 0.0496 of them a round, 50 rounds, delta 1e-05" in text
    assert "Use less than" not in text


def test_the_noise_that_is_printed_keeps_the_budget(capsys):
    table, _ = cells(capsys, *FEDERATION, "--epsilon", "1")
    assert all(0.99 < float(row[1]) <= 1.0 for row in table.values()) and len(table) == 3
    again, _ = cells(capsys, *FEDERATION, "--noise", table["Poisson"][0])
    assert again["Poisson"] == table["Poisson"]


def test_a_delta_that_protects_nobody_is_said(capsys):
    given = ("--clients", "100", "--sample", "0.1", "--rounds", "2", "--delta", "0.02")
    _, text = cells(capsys, *given, "--noise", "4")
    assert "publishing the whole data of one client would keep it. Use less than 0.01." in text


def test_the_page_has_a_line_for_each_way_of_sampling(capsys, tmp_path):
    page = tmp_path / "epsilon.html"
    given = ("--clients", "100", "--sample", "0.1", "--rounds", "4", "--delta", "1e-5")
    table, text = cells(capsys, *given, "--noise", "9", "--cap", "12", "--out", str(page))
    assert f"Picture: {page}" in text
    html = page.read_text()
    assert len(re.findall("<polyline", html)) == len(table) == 4
    for sampling, row in table.items():
        assert sampling in html and f">{row[1]}</data>" in html


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ((), "got neither of --noise and --epsilon, expected one"),
        (("--noise", "1", "--epsilon", "2"), "got both of --noise and --epsilon"),
        (("--noise", "0"), "the noise multiplier is 0, expected at least 0.01"),
        (("--epsilon", "-1"), "the budget epsilon is -1, expected more than 0"),
        (("--noise", "1", "--rounds", "0"), "--rounds is 0, expected at least 1"),
        (("--noise", "1", "--delta", "1"), "delta is 1, expected more than 0 and less than 1"),
        (("--noise", "1", "--sample", "80"), "the sampled share is 80, expected more than 0"),
        (("--noise", "1", "--cap", "5000"), "the cap is 5000 under poisson sampling of 1613"),
        (("--noise", "1", "--out", "a.png"), "--out is 'a.png', expected a file name that ends in"),
        (("--nois", "1"), "Did you mean '--noise'?"),
    ],
)
def test_bad_input_is_one_sentence(capsys, given, sentence):
    assert main(["privacy", *FEDERATION, *given]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
