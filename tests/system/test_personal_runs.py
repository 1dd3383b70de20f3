"""Whole runs with own factors: the federation is the same, and a resumed run finds them again."""

import csv

import pytest

from federation import StopAt, Stopped, adapter_bytes, client_rows, rounds, small, untimed
from flexlora.simulations.simulate import resume, simulate
from flexlora.wire.jobs import PERSONAL

PLAIN = small(
    num_server_rounds=3,
    fraction_train=0.5,
    lora__dropout=0.1,
    eval__max_examples=2,
    method__name="carried",
)
OWN = PLAIN.with_values({"personal.rank": 2, "personal.max-steps": 2})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One run without own factors and one with them."""
    folder = tmp_path_factory.mktemp("runs")
    for name, config in (("plain", PLAIN), ("own", OWN)):
        simulate(config, folder / name)
    return folder / "plain", folder / "own"


def evaluations(folder):
    with (folder / "evaluation.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_federation_is_the_same_with_and_without_own_factors(runs):
    plain, own = runs
    assert adapter_bytes(own) == adapter_bytes(plain)
    assert untimed(client_rows(own)) == untimed(client_rows(plain))
    shared = [row for row in evaluations(own) if row["rank_class"] != PERSONAL]
    assert shared == evaluations(plain)
    without = [
        {key: value for key, value in row.items() if PERSONAL not in key}
        for row in untimed(rounds(own))
    ]
    assert without == untimed(rounds(plain))


def test_who_has_trained_by_a_round_is_scored_with_its_own_factors(runs):
    _, own = runs
    trained, seen = set(), []
    for at in (1, 2, 3):
        trained |= {row["client_id"] for row in client_rows(own, at)}
        rows = [row for row in evaluations(own) if row["round"] == str(at)]
        scored = {row["client_id"] for row in rows if row["rank_class"] == PERSONAL}
        assert scored == trained
        assert rounds(own)[at]["personal_clients"] == len(trained)
        seen.append(len(trained))
    assert seen[0] == 2 < seen[-1], "a client that was not asked at once should join later"
    assert not [key for key in rounds(own)[0] if PERSONAL in key]


@pytest.mark.parametrize(("event", "server_round"), [("replied", 2), ("round_finished", 3)])
def test_a_resumed_run_goes_on_from_the_factors_before_the_round(
    runs, event, server_round, tmp_path
):
    """The round is repeated: its clients have already kept what they trained in it."""
    with pytest.raises(Stopped):
        simulate(OWN, tmp_path / "run", observer=StopAt(event, server_round))
    kept = list((tmp_path / "run" / "personal").rglob(f"round-{server_round:06d}.safetensors"))
    assert kept, "nothing was kept in the round that is repeated, so nothing is tried"
    resume(tmp_path / "run")
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(runs[1])
    assert evaluations(tmp_path / "run") == evaluations(runs[1])
    assert untimed(rounds(tmp_path / "run")) == untimed(rounds(runs[1]))


def test_a_run_over_another_one_begins_anew(runs, tmp_path):
    """Factors of the run that was there are not taken for those of this one."""
    simulate(OWN.with_values({"seed": 5}), tmp_path / "run")
    simulate(OWN, tmp_path / "run", overwrite=True)
    assert evaluations(tmp_path / "run") == evaluations(runs[1])
