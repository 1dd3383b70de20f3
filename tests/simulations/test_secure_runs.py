"""``privacy.mode=secure`` in the engine: the plain run's result, without anybody's own update."""

import math

import pytest

from federation import client_rows, global_delta, relative_gap, rounds, small
from flexlora.errors import RunFailed, UserError
from flexlora.simulations.simulate import simulate

BASIS = {
    "method__name": "basis",
    "method__server_learning_rate": 1.0,
    "num_server_rounds": 2,
    "clients__count": 6,
    "train__max_length": 64,
    "ranks__shares": "equal",
    "eval__every": 0,
    "server__late_rounds": 0,
    "server__max_norm_ratio": 0.0,
    "train__learning_rate": 0.02,
}
SECURE = {"privacy__mode": "secure", "privacy__clip": 10.0}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The plain run, the secure one, and the secure one again with random bits from the seed."""
    folder = tmp_path_factory.mktemp("secure")
    changes = {
        "plain": {},
        "secure": SECURE,
        "first": {**SECURE, "privacy__reproducible": True},
        "second": {**SECURE, "privacy__reproducible": True},
    }
    for name, more in changes.items():
        simulate(small(**BASIS, **more), folder / name)
    return folder


def test_the_global_change_is_that_of_the_plain_run(runs):
    plain, secure = global_delta(runs / "plain"), global_delta(runs / "secure")
    assert 0.0 < relative_gap(secure, plain) < 0.02, "rounding, and nothing else"


def test_means_are_those_of_the_plain_run(runs):
    for plain, secure in zip(rounds(runs / "plain"), rounds(runs / "secure"), strict=True):
        if plain["round"]:
            assert secure["clients_ok"] == plain["clients_ok"] == secure["summed_clients"] == 6
            assert secure["train_loss"] == pytest.approx(plain["train_loss"], rel=0.02)
            assert secure["clipped_share"] == 0.0 and "clipped_share" not in plain


def test_no_row_has_a_clients_own_loss_and_the_plain_runs_rows_have(runs):
    assert all(row["loss_before"] and row["loss_after"] for row in client_rows(runs / "plain"))
    rows = client_rows(runs / "secure")
    assert len(rows) == 12 and {row["status"] for row in rows} == {"ok"}
    assert {(row["loss_before"], row["loss_after"]) for row in rows} == {("", "")}


def test_with_random_bits_from_the_seed_a_run_repeats(runs):
    first, second = global_delta(runs / "first"), global_delta(runs / "second")
    assert all((first[name] == second[name]).all() for name in first)
    other = global_delta(runs / "secure")
    assert any((first[name] != other[name]).any() for name in first)


def test_masked_bytes_are_few_more_than_sixteen_bit_ones(runs):
    """Of a tiny model, whose keys and shares weigh most: float32 sends 4 bytes a number."""
    for plain, secure in zip(
        client_rows(runs / "plain"), client_rows(runs / "secure"), strict=True
    ):
        assert int(secure["bytes_up"]) < 0.6 * int(plain["bytes_up"])


def test_what_is_clipped_is_as_long_as_the_clip_and_is_counted(tmp_path):
    simulate(small(**BASIS, **{**SECURE, "privacy__clip": 1e-3}), tmp_path / "run")
    last = rounds(tmp_path / "run")[-1]
    assert last["clipped_share"] == 1.0
    norm = math.sqrt(sum(float(d.square().sum()) for d in global_delta(tmp_path / "run").values()))
    assert 0.0 < norm < 2.1e-3


def test_a_band_of_too_few_is_said_and_a_round_of_too_few_is_skipped(tmp_path):
    few = {"ranks__shares": "0.7,0.3", "num_server_rounds": 1}
    simulate(small(**{**BASIS, **few}, **SECURE), tmp_path / "band")
    note = "columns 3 to 4 left out: fewer than privacy.min-group=3 clients have them (2)"
    assert rounds(tmp_path / "band")[-1]["left_out"] == note
    run = tmp_path / "round"
    with pytest.raises(RunFailed, match="6 clients gave keys"):
        simulate(small(**{**BASIS, **few}, **SECURE, privacy__min_group=7), run)
    (row,) = (row for row in rounds(run) if row["round"] == 1)
    assert "6 clients gave keys, expected 7 (privacy.min-group)" in row["skipped"]


def test_clients_that_leave_while_they_train_are_missing_from_the_sum_alone(tmp_path):
    gone = {"population__dropout": 0.3, "clients__count": 9, "num_server_rounds": 1}
    simulate(small(**{**BASIS, **gone}, **SECURE), tmp_path / "secure")
    simulate(small(**{**BASIS, **gone}), tmp_path / "plain")
    statuses = [row["status"] for row in client_rows(tmp_path / "secure")]
    assert 0 < statuses.count("failed") < 5
    gap = relative_gap(global_delta(tmp_path / "secure"), global_delta(tmp_path / "plain"))
    assert gap < 0.02


# --- with noise ----------------------------------------------------------------------------------

NOISY = {
    "privacy__mode": "secure+central",
    "privacy__clip": 10.0,
    "privacy__noise_multiplier": 0.01,
    "ranks__shares": "0.7,0.3",
    "sampling__policy": "poisson",
    "privacy__reproducible": True,
    "num_server_rounds": 1,
    "fraction_train": 1.0,
}


@pytest.mark.parametrize("method", ["basis", "ffa-lora"])
def test_with_noise_the_sum_is_that_of_central_privacy(method, tmp_path):
    """The same noise of the same seed on the same sum: rounding is all that differs."""
    options = {**BASIS, **NOISY, "method__name": method}
    if method == "ffa-lora":
        del options["method__server_learning_rate"]
    for mode in ("central", "secure+central"):
        simulate(small(**{**options, "privacy__mode": mode}), tmp_path / mode)
    central, both = rounds(tmp_path / "central")[-1], rounds(tmp_path / "secure+central")[-1]
    assert both["epsilon"] == central["epsilon"]
    assert both["clipped_share"] == central["clipped_share"] == 0.0
    gap = relative_gap(
        global_delta(tmp_path / "secure+central"), global_delta(tmp_path / "central")
    )
    assert 0.0 < gap < 0.03
    uploads = {int(row["bytes_up"]) for row in client_rows(tmp_path / "secure+central")}
    assert max(uploads) - min(uploads) < 200, "all columns are one band"


def test_a_cohort_that_may_be_smaller_than_the_group_is_refused(tmp_path):
    changes = {**BASIS, **NOISY, "fraction_train": 0.5}
    with pytest.raises(UserError, match=r"of 6 clients sampled with probability 0.5, fewer than 3"):
        simulate(small(**changes), tmp_path / "run")


# --- what is refused ---------------------------------------------------------------------------

REFUSED = {
    "method.name is flexlora": {"method__name": "flexlora", "method__server_learning_rate": 1.0},
    "privacy.clip is 0": {"privacy__clip": 0.0},
    "server.late-rounds is 1": {"server__late_rounds": 1},
    "server.over-selection is 0.5": {"server__over_selection": 0.5},
    "sampling.policy is utility": {"sampling__policy": "utility"},
    "wire.dtype is int8": {"wire__dtype": "int8"},
    "eval.factor-gap is true": {"eval__factor_gap": True},
    "privacy.noise-multiplier is 1 with": {"privacy__noise_multiplier": 1.0},
    "privacy.epsilon is 1 with": {"privacy__epsilon": 1.0},
    "privacy.min-group is 2, expected at least 3": {"privacy__min_group": 2},
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_sees_single_updates_is_refused(words, tmp_path):
    with pytest.raises(UserError, match=words):
        simulate(small(**{**BASIS, **SECURE, **REFUSED[words]}), tmp_path / "run")
