"""``privacy.mode=central`` in the server: what is refused, what is spent, where a run ends."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from dp_accounting import get_epsilon_gaussian

from faulty_grid import FaultyGrid, people, run, settings
from flexlora.errors import UserError
from flexlora.privacy.accounting import Mechanism, epsilon_of
from flexlora.runs.folder import RunFolder
from flexlora.server.app import federate
from flexlora.server.members.sampling import poisson_sample
from flexlora.server.results import roll_back
from flexlora.server.settings import check_config

PRIVATE = {
    "privacy__mode": "central",
    "privacy__clip": 0.5,
    "privacy__noise_multiplier": 3.0,
    "sampling__policy": "poisson",
    "fraction_train": 0.5,
    "server__late_rounds": 0,
    "method__server_learning_rate": 1.0,
}
CLIENTS = 8


def private(**changes):
    return settings(**{**PRIVATE, **changes})


def linear(method, **changes):
    """The same of a method whose sum is linear; ``ffa-lora`` has no server rate."""
    keys = {**PRIVATE, **changes, "method__name": method}
    if method == "ffa-lora":
        del keys["method__server_learning_rate"]
    return settings(**keys)


def spent(rounds, noise=3.0, share=0.5):
    once = Mechanism(num_clients=CLIENTS, sample_share=share, noise_multiplier=noise)
    return epsilon_of([(once, rounds)], 1e-5)


def in_folder(path, config, **options):
    """The run in the folder ``path``, and its rows of ``metrics.jsonl``."""
    strategy = federate(FaultyGrid(people(CLIENTS)), config, path, **options)
    return strategy, rows_of(path)


def rows_of(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"privacy__mode": "none"}, "privacy.clip is 0.5 with privacy.mode=none"),
        ({"privacy__clip": 0.0}, "privacy.clip is 0 with privacy.mode=central: noise hides"),
        ({"privacy__noise_multiplier": 0.0}, "privacy.noise-multiplier is 0, expected at least"),
        ({"sampling__policy": "utility"}, "sampling.policy is utility with privacy.mode=central"),
        ({"sampling__policy": "uniform"}, "sampling.policy is uniform with privacy.mode=central"),
        ({"server__over_selection": 0.5}, "server.over-selection is 0.5, but under"),
        ({"server__late_rounds": 2}, "server.late-rounds is 2 with privacy.mode=central: a late"),
        ({"server__quorum": 3}, "server.quorum is 3 with privacy.mode=central: whether enough"),
        ({"method__server_learning_rate": 0.0}, "method.server-learning-rate is 0"),
        ({"fraction_train": 0.0}, "fraction-train is 0 with privacy.mode=central"),
        (
            {"sampling__cap": 7, "privacy__as_if_clients": 100},
            "sampling.cap is 7 with privacy.as-if-clients",
        ),
        ({"start_from": "RUN"}, "start-from is .*RUN' with privacy.mode=central"),
    ],
)
def test_what_the_theorem_excludes_is_refused(changes, sentence):
    check_config(private())
    with pytest.raises(UserError, match=sentence):
        check_config(private(**changes))


@pytest.mark.parametrize("method", ["flexlora", "fedit", "hetlora", "rolora"])
def test_a_method_that_does_not_add_changes_is_refused_by_name(method):
    changes = {k: v for k, v in PRIVATE.items() if not k.startswith("method__")}
    with pytest.raises(UserError, match=f"method.name is {method} with privacy.mode=central"):
        check_config(settings(**changes, method__name=method))


def test_epsilon_after_each_round_is_the_accountants():
    rows = []
    strategy = run(FaultyGrid(people(CLIENTS)), private(num_server_rounds=3), rows=rows)
    by_round = {row["round"]: row["metrics"]["epsilon"] for row in rows}
    assert by_round == {t: pytest.approx(spent(t), rel=1e-9) for t in by_round} and 3 in by_round
    assert strategy.privacy.ledger.num_rounds == 3


def test_a_run_stops_at_its_budget_and_a_resumed_one_remembers(tmp_path):
    folder, budget = tmp_path / "run", spent(3) * 1.001
    config = private(num_server_rounds=9, privacy__epsilon=budget)
    strategy, rows = in_folder(folder, config)
    assert [row["round"] for row in rows] == [0, 1, 2, 3] and strategy.state.round == 3
    assert rows[3]["epsilon"] <= budget < spent(4)
    cause = f"epsilon {spent(3):.4g} is spent; one more round would make it {spent(4):.4g}"
    assert cause in rows[3]["budget_spent"] and "budget_spent" not in rows[2]
    with pytest.raises(UserError, match=cause):
        in_folder(folder, config, resume=True)
    assert rows_of(folder) == rows


def test_a_resumed_run_goes_on_with_its_ledger_and_its_secret(tmp_path):
    folder = tmp_path / "run"
    begun, _ = in_folder(folder, private(num_server_rounds=2))
    again, rows = in_folder(folder, private(num_server_rounds=4), resume=True)
    assert again.privacy.sampling_seed == begun.privacy.sampling_seed != private().seed
    assert rows[-1]["round"] == 4 and rows[-1]["epsilon"] == pytest.approx(spent(4), rel=1e-9)


@pytest.mark.parametrize(("method", "quantile"), [("residual", 0.4), ("basis", 0), ("ffa-lora", 0)])
def test_a_reproducible_run_in_two_parts_is_the_run_in_one(method, quantile, tmp_path):
    def of(rounds):
        changes = {"privacy__reproducible": True, "privacy__clip_quantile": float(quantile)}
        return linear(method, num_server_rounds=rounds, **changes)

    whole, _ = in_folder(tmp_path / "whole", of(4))
    in_folder(tmp_path / "parts", of(2))
    parts, _ = in_folder(tmp_path / "parts", of(4), resume=True)
    assert parts.privacy.ledger == whole.privacy.ledger
    assert parts.privacy.clip == whole.privacy.clip
    assert (whole.privacy.clip == 0.5) == (not quantile)
    assert whole.privacy.ledger.epsilon == pytest.approx(spent(4), rel=1e-9)  # as of any method
    for name in whole.state.change:
        both = (one.state.change.delta_weight(name) for one in (whole, parts))
        assert torch.equal(*both)


def test_a_budget_that_allows_no_round_is_refused_before_the_first(tmp_path):
    config = private(privacy__epsilon=spent(1) * 0.9)
    with pytest.raises(UserError, match="epsilon 0 is spent; one more round would make it"):
        in_folder(tmp_path / "run", config)


def test_a_round_without_any_update_is_noise_and_counts():
    """Whether a client was sampled must not show in whether the round counts."""
    config = private(fraction_train=1e-6, num_server_rounds=1)
    grid = FaultyGrid(people(CLIENTS))
    strategy = run(grid, config)
    assert not [sent for sent in grid.pushed if sent[0] == "train"]
    assert strategy.privacy.ledger.num_rounds == 1 and not strategy.metrics.skipped
    assert all(float(svd.S.sum()) > 0 for svd in strategy.state.change.values())


@pytest.mark.parametrize("method", ["basis", "ffa-lora"])
def test_the_width_of_the_noise_is_that_of_the_widest_class_whoever_was_sampled(method):
    """Ranks are 2 and 4: where only a client of rank 2 is sampled, rank 4 has noise as well."""
    for share, seed in ((1e-6, 0), (0.2, 15)):
        config = linear(
            method,
            fraction_train=share,
            seed=seed,
            num_server_rounds=1,
            privacy__reproducible=True,
            wire__dtype="bfloat16",
        )
        grid = FaultyGrid(people(CLIENTS))
        strategy = run(grid, config)
        asked = [sent[2] for sent in grid.pushed if sent[0] == "train"]
        ranks = {strategy.roster.members[client].rank_class.rank for client in asked}
        assert ranks == (set() if share < 0.1 else {2})
        for name, (out_features, in_features) in strategy.state.change.shapes.items():
            change = strategy.state.change.delta_weight(name)
            rank = torch.linalg.matrix_rank(change, rtol=1e-4)
            assert rank == min(4, out_features, in_features)


def test_the_seed_draws_the_noise_and_the_sample_only_where_that_is_asked_for():
    def after(**changes):
        config = private(num_server_rounds=1, **changes)
        grid = FaultyGrid(people(CLIENTS))
        strategy = run(grid, config)
        name = next(iter(strategy.state.change))
        asked = {sent[2] for sent in grid.pushed if sent[0] == "train"}
        return strategy.state.change.delta_weight(name), asked

    first, asked = after(privacy__reproducible=True)
    assert torch.equal(first, after(privacy__reproducible=True)[0])
    assert not torch.allclose(first, after(privacy__reproducible=True, seed=1)[0])
    sample = poisson_sample(people(CLIENTS).values(), 0.5, seed=0, server_round=1)
    assert asked == set(sample)
    assert not torch.allclose(after(fraction_train=1.0)[0], after(fraction_train=1.0)[0])
    assert len({frozenset(after()[1]) for _ in range(8)}) > 1  # all equal: one in 256^7


def test_a_large_update_is_clipped_and_not_refused():
    """The bound by the others' norms would let them decide whether a client counts."""
    rows = []
    run(FaultyGrid(people(CLIENTS)), private(fraction_train=1.0, privacy__clip=1e-3), rows=rows)
    assert {row["status"] for row in rows} == {"ok"} and len(rows) == 2 * CLIENTS
    assert {row["metrics"]["clipped_share"] for row in rows} == {1.0}


def test_a_client_that_joins_leaves_the_divisor_as_it_was():
    config = private(num_server_rounds=3)
    grid = FaultyGrid(people(CLIENTS), later={99: (1.5, "newcomer")})
    strategy = run(grid, config)
    assert "newcomer" in strategy.roster.members
    counted = [mechanism.num_clients for mechanism, _ in strategy.privacy.ledger.rounds]
    assert counted[0] == CLIENTS and counted[-1] == CLIENTS + 1
    assert strategy.privacy.gaussian_sum(4, CLIENTS + 1).expected_clients == 0.5 * CLIENTS


# --- a clip norm that follows a quantile -------------------------------------------------------


def test_the_clip_follows_the_noised_share_and_the_noise_pays_for_the_count(tmp_path):
    """The ledger has the joint multiplier; the sum gets more, and the count twice its deviation."""
    adaptive = {"privacy__clip_quantile": 0.5, "privacy__noise_multiplier": 0.3}
    config = private(num_server_rounds=3, privacy__reproducible=True, **adaptive)
    strategy, rows = in_folder(tmp_path / "run", config)
    assert rows[1]["clip"] == 0.5 and rows[3]["epsilon"] == spent(3, noise=0.3)
    clips = [*(row["clip"] for row in rows[2:]), strategy.privacy.clip]
    for row, after in zip(rows[1:], clips, strict=True):
        share = 1 - row["clipped_share"]
        if 0 < share < 1:  # what is shown is limited to that
            assert after == pytest.approx(row["clip"] * math.exp(-0.2 * (share - 0.5)), rel=1e-12)
            counted = row["clients_ok"]
            assert min(abs(share * counted - k) for k in range(counted + 1)) > 1e-9
        assert after != row["clip"]
    drawn = strategy.privacy.gaussian_sum(4, CLIENTS)
    joint = drawn.noise_multiplier**-2 + (2 * 0.6) ** -2
    assert joint == pytest.approx(0.3**-2, rel=1e-12) and drawn.clip == strategy.privacy.clip


# --- a cohort that stands for a larger population ----------------------------------------------


def as_if(stated, **changes):
    config = private(privacy__as_if_clients=stated, num_server_rounds=2, **changes)
    grid = FaultyGrid(people(CLIENTS))
    grid.in_process = True
    return run(grid, config)


def test_a_cohort_that_stands_for_more_has_their_noise_on_the_mean_and_their_epsilon(tmp_path):
    strategy = as_if(80 * CLIENTS)
    once = Mechanism(num_clients=80 * CLIENTS, sample_share=0.5, noise_multiplier=3.0)
    metrics = strategy.privacy.metrics()
    assert metrics["as_if_clients"] == 640
    assert metrics["epsilon"] == pytest.approx(epsilon_of([(once, 2)], 1e-5), rel=1e-9)
    drawn = strategy.privacy.gaussian_sum(3, CLIENTS)
    assert drawn.expected_clients == 0.5 * CLIENTS  # the divisor is that of the cohort
    assert drawn.deviation == pytest.approx(3.0 * 0.5 / (0.5 * 640), rel=1e-12)


def test_scaled_noise_is_refused_over_nodes_and_for_fewer_clients_than_there_are():
    config = private(privacy__as_if_clients=640)
    with pytest.raises(UserError, match="as-if-clients is 640 in a run over nodes"):
        run(FaultyGrid(people(CLIENTS)), config)
    with pytest.raises(UserError, match="as-if-clients is 7 and 8 clients take part, expected at"):
        as_if(7)


# --- everybody who is there: no amplification --------------------------------------------------


def test_a_run_that_asks_everybody_over_nodes_is_accounted_without_amplification():
    """Three of eight leave: none takes their place, and the divisor is still eight."""
    config = private(fraction_train=1.0, num_server_rounds=2)
    nodes = people(CLIENTS)
    gone = list(nodes)[:3]
    grid = FaultyGrid(nodes, away={node: [(0.5, 10**6)] for node in gone})
    strategy = run(grid, config)
    asked = {t: {s[2] for s in grid.pushed if s[:2] == ("train", t)} for t in (1, 2)}
    assert len(asked[2]) == CLIENTS - 3
    ((mechanism, count),) = strategy.privacy.ledger.rounds
    assert (mechanism.sampling, count) == ("none", 2)
    closed_form = get_epsilon_gaussian(3.0 / math.sqrt(2), 1e-5)
    assert strategy.privacy.ledger.epsilon == pytest.approx(closed_form, rel=1e-12)
    assert strategy.privacy.gaussian_sum(3, CLIENTS).expected_clients == CLIENTS


def test_a_rollback_would_forget_what_was_spent(tmp_path):
    in_folder(tmp_path / "run", private(num_server_rounds=2))
    with pytest.raises(UserError, match=r"privacy\.mode=central: its later rounds have spent"):
        roll_back(str(tmp_path / "run"), 1)


def test_a_run_without_privacy_has_no_epsilon_and_no_ledger(tmp_path):
    _, rows = in_folder(tmp_path / "run", settings())
    assert not [key for row in rows for key in row if re.search("epsilon|clipped|budget", key)]
    assert "privacy" not in RunFolder(tmp_path / "run").load_notes()
