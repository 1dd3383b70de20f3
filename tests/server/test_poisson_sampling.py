"""Poisson sampling: each client independently, from seed and round alone; the cap; bad input."""

from __future__ import annotations

from collections import Counter

import pytest

from faulty_grid import FaultyGrid, people, run, settings
from flexlora.errors import UserError
from flexlora.server.members.sampling import poisson_sample
from flexlora.server.settings import check_config

CLIENTS = [f"c{k:02d}" for k in range(40)]


def sample(clients=CLIENTS, share=0.25, *, cap=0, seed=0, server_round=1):
    return poisson_sample(clients, share, cap=cap, seed=seed, server_round=server_round)


def test_the_sample_is_a_function_of_seed_and_round_whoever_else_is_there():
    assert sample() == sorted(sample()) == sample(CLIENTS[::-1])
    assert sample(seed=1) != sample() != sample(server_round=2)
    some = CLIENTS[::3]
    assert sample(some) == [client for client in sample() if client in some]


def test_every_client_has_the_probability_and_no_client_the_others_luck():
    """4,000 rounds: frequencies within five deviations, and the variance of independent coins."""
    rounds, share = 4000, 0.25
    samples = [sample(CLIENTS[:10], server_round=t) for t in range(rounds)]
    counts = Counter(client for one in samples for client in one)
    deviation = (rounds * share * (1 - share)) ** 0.5
    assert all(abs(counts[client] - rounds * share) < 5 * deviation for client in CLIENTS[:10])
    mean = sum(map(len, samples)) / rounds
    variance = sum((len(one) - mean) ** 2 for one in samples) / rounds
    assert variance == pytest.approx(10 * share * (1 - share), rel=0.15)  # of a fixed size: 0


def test_shares_of_none_and_all():
    assert sample(share=0.0) == [] and sample(share=1.0) == CLIENTS


def test_the_cap_leaves_a_random_subset_of_those_drawn():
    rounds, cap = 4000, 2
    counts: Counter[str] = Counter()
    for server_round in range(rounds):
        drawn = sample(CLIENTS[:8], 0.5, server_round=server_round)
        capped = sample(CLIENTS[:8], 0.5, cap=cap, server_round=server_round)
        assert set(capped) <= set(drawn) and len(capped) == min(cap, len(drawn))
        counts.update(capped)
    mean = sum(counts.values()) / 8
    assert all(abs(counts[client] - mean) < 5 * mean**0.5 for client in CLIENTS[:8])


def asked(grid):
    """The clients that were sent training, by round."""
    found: dict[int, set[str]] = {}
    for kind, server_round, client_id in (sent[:3] for sent in grid.pushed):
        if kind == "train":
            found.setdefault(server_round, set()).add(client_id)
    return found


def test_the_server_asks_the_sampled_clients_and_nobody_in_the_place_of_one_that_is_away():
    config = settings(sampling__policy="poisson", fraction_train=0.5, num_server_rounds=6)
    nodes = people(8)
    absent = next(iter(nodes))
    grid = FaultyGrid(nodes, away={absent: [(2.5, 1e9)]})
    run(grid, config)
    missed = 0
    for server_round in range(1, 7):
        sampled = poisson_sample(nodes.values(), 0.5, seed=config.seed, server_round=server_round)
        there = asked(grid).get(server_round, set())
        assert set(sampled) - {nodes[absent]} <= there <= set(sampled)
        missed += there != set(sampled)
    assert missed > 0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sampling.cap": 4}, "sampling.cap is 4, which sampling.policy=uniform does not read"),
        (
            {"sampling.policy": "poisson", "server.over-selection": 0.5},
            "server.over-selection is 0.5, but under sampling.policy=poisson each client",
        ),
        (
            {"sampling.policy": "poisson", "min-train-clients": 3},
            "min-train-clients is 3, but under sampling.policy=poisson each client",
        ),
    ],
)
def test_what_does_not_go_with_it_is_refused(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        check_config(settings().with_values(changes))
