"""Who trains in a round: each policy's law, seeded and the same after a resume."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest

from flexlora.server.members.sampling import History, Reachable, choose

POLICIES = ("uniform", "examples", "availability", "utility", "stratified")


def crowd(count=20, examples=lambda k: 10, rank_class=lambda k: "rank_2"):
    return [
        Reachable(client_id=f"c{k:02d}", num_examples=examples(k), rank_class=rank_class(k))
        for k in range(count)
    ]


def seen_by(clients, rounds=1):
    history = History()
    for _ in range(rounds):
        history.see([client.client_id for client in clients])
    return history


def drawn(policy, clients, count, history, rounds=400):
    counts = Counter()
    for server_round in range(1, rounds + 1):
        counts.update(
            choose(policy, clients, count, history=history, server_round=server_round, seed=0)
        )
    return counts


@pytest.mark.parametrize("policy", POLICIES)
def test_as_many_as_asked_each_once_the_same_again_and_others_next_round(policy):
    clients = crowd()
    history = seen_by(clients)
    for k, client in enumerate(clients[:10]):
        history.learn(client.client_id, 1, 1.0 + k / 10, 5.0)

    def once(server_round, order=1):
        return choose(
            policy, clients[::order], 6, history=history, server_round=server_round, seed=3
        )

    first = once(2)
    assert len(first) == len(set(first)) == 6 and first == sorted(first)
    assert once(2) == first == once(2, order=-1)
    assert any(once(server_round) != first for server_round in range(3, 9))


@pytest.mark.parametrize("policy", POLICIES)
def test_fewer_clients_than_asked_are_all_taken(policy):
    clients = crowd(3)
    args = {"history": seen_by(clients), "server_round": 1, "seed": 0}
    assert choose(policy, clients, 9, **args) == ["c00", "c01", "c02"]
    assert choose(policy, [], 9, **args) == []


def test_uniform_is_uniform_and_examples_is_as_the_examples():
    clients = crowd(10, examples=lambda k: 90 if k == 0 else 10)
    history = seen_by(clients)
    even = drawn("uniform", clients, 1, history, 3000)
    assert all(abs(count - 300) < 5 * math.sqrt(300) for count in even.values())
    heavy = drawn("examples", clients, 1, history, 3000)
    assert abs(heavy["c00"] - 1500) < 5 * math.sqrt(750)


def test_availability_makes_up_for_being_seldom_there():
    """Half the clients are there in every fourth round only; over all rounds all count alike."""
    clients, history = crowd(20), History()
    counts = Counter()
    for server_round in range(1, 1601):
        there = [c for k, c in enumerate(clients) if k < 10 or server_round % 4 == 0]
        history.see([client.client_id for client in there])
        args = {"history": history, "server_round": server_round, "seed": 1}
        counts.update(choose("availability", there, 2, **args))
    seldom = sum(counts[client.client_id] for client in clients[10:])
    often = sum(counts[client.client_id] for client in clients[:10])
    history.rounds, plain = 1, Counter()
    for server_round in range(1, 1601):
        there = [c for k, c in enumerate(clients) if k < 10 or server_round % 4 == 0]
        args = {"history": history, "server_round": server_round, "seed": 1}
        plain.update(choose("uniform", there, 2, **args))
    unweighted = sum(plain[client.client_id] for client in clients[10:]) / 3200
    assert unweighted < 0.15 < seldom / (seldom + often)


def test_utility_prefers_large_losses_avoids_the_slow_and_goes_on_exploring():
    clients = crowd(20)
    history = seen_by(clients)
    for k, client in enumerate(clients[:16]):
        history.learn(client.client_id, 30, 4.0 if k < 4 else 1.0, 100.0 if k == 0 else 1.0)
    counts = Counter()
    for seed in range(300):
        counts.update(choose("utility", clients, 5, history=history, server_round=31, seed=seed))
    fast_losers = [counts[f"c{k:02d}"] for k in (1, 2, 3)]
    assert min(fast_losers) > 5 * max(counts[f"c{k:02d}"] for k in range(4, 16))
    assert counts["c00"] < min(fast_losers) / 3  # as high a loss, a hundred times as slow
    new = sum(counts[f"c{k:02d}"] for k in range(16, 20))
    assert 0.3 < new / (300 * 5) < 0.6  # 0.9 * 0.98**30 = 0.49 of five


def test_utility_without_anything_known_draws_alike():
    clients = crowd(10)
    counts = drawn("utility", clients, 2, seen_by(clients), 1000)
    assert all(abs(count - 200) < 5 * math.sqrt(200) for count in counts.values())


@pytest.mark.parametrize("count", [1, 2, 7])
def test_utility_explores_its_fifth_in_the_mean_also_of_few_clients(count):
    """Rounded alike in every round, a fifth of two clients would be nobody for ever."""
    clients = crowd(40)
    history = seen_by(clients)
    for client in clients[:10]:
        history.learn(client.client_id, 1, 1.0, 1.0)
    new = []
    for server_round in range(80, 80 + 1000):  # where the share has come down to its least
        args = {"history": history, "server_round": server_round, "seed": 0}
        chosen = choose("utility", clients, count, **args)
        new.append(sum(int(client_id[1:]) >= 10 for client_id in chosen))
    assert abs(sum(new) / 1000 - count / 5) < 5 * math.sqrt(0.25 / 1000)
    assert set(new) == {math.floor(count / 5), math.ceil(count / 5)}


def test_stratified_gives_every_class_its_share():
    clients = crowd(20, rank_class=lambda k: "rank_16" if k < 5 else "rank_2")
    history = seen_by(clients)
    for server_round in range(1, 30):
        args = {"history": history, "server_round": server_round, "seed": 0}
        chosen = choose("stratified", clients, 8, **args)
        assert sum(int(client_id[1:]) < 5 for client_id in chosen) == 2
    uniform = {
        sum(
            int(c[1:]) < 5
            for c in choose("uniform", clients, 8, history=history, server_round=r, seed=0)
        )
        for r in range(1, 30)
    }
    assert len(uniform) > 1, "the control would be stratified by itself"


def test_history_survives_json():
    history = seen_by(crowd(3), rounds=2)
    history.learn("c01", 2, 0.5, 7.25)
    again = History.from_dict(json.loads(json.dumps(history.to_dict())))
    assert again == history
