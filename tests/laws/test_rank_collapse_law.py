"""Rank collapse as a law: what rounds without training leave of every direction of G."""

import pytest

from rank_law import ATTENTION, CASES, COLLAPSES, MLP, measure


@pytest.mark.parametrize("method", COLLAPSES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_every_value_of_an_untrained_round_is_the_law_s(case, method):
    measured = measure(case, method, rounds=3, seed=1, collapses=COLLAPSES[method])
    assert measured.worst() < 1e-6
    assert set(measured.seen) == {ATTENTION, MLP}


@pytest.mark.parametrize("method", COLLAPSES)
def test_no_method_follows_the_other_law(method):
    """The negative control: a distance that is always small would show nothing."""
    measured = measure(CASES[0], method, rounds=2, seed=1, collapses=not COLLAPSES[method])
    assert measured.worst() > 0.5


def test_the_figures_of_the_design_are_seen():
    """80 % of the clients at rank 8: sigma_20 falls 1, 0.2, 0.04, 0.008; the others keep it."""
    for method, law in (("flexlora", [1, 0.2, 0.04, 0.008]), ("residual", [1, 1, 1, 1])):
        measured = measure(CASES[0], method, rounds=3, seed=0, collapses=COLLAPSES[method])
        assert measured.band(20)["seen"] == pytest.approx(law, rel=1e-9)
        assert measured.band(8)["seen"] == pytest.approx([1, 1, 1, 1], rel=1e-9)
        beyond = measured.band(33)["seen"][1:]
        assert beyond == ([0, 0, 0] if method == "flexlora" else pytest.approx([1, 1, 1]))


def test_shares_are_of_rows_not_of_clients_and_go_by_module():
    """Half the clients are weak and hold four rows of five; type 3 trains 200 in the MLP only."""
    assert CASES[2].shares_of_weight(ATTENTION, 17).tolist() == pytest.approx(
        [1.0] * 4 + [0.2] * 12 + [0.0]
    )
    paper = CASES[3]
    attention, mlp = (paper.shares_of_weight(name, 204) for name in (ATTENTION, MLP))
    places = [7, 8, 29, 30, 199, 200]
    assert attention[places].tolist() == pytest.approx([1, 0.2, 0.2, 0.1, 0.1, 0])
    assert mlp[places].tolist() == pytest.approx([1, 0.2, 0.2, 0.15, 0.15, 0])
