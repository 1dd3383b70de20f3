"""Partitions: every row has one owner, splits agree, and the seed decides."""

import random
from collections import Counter

import pytest

from flexlora.data.partitions import PARTITIONS, partition
from flexlora.data.rows import Row
from flexlora.errors import UserError


def make_rows(tasks=4, train=60, test=15):
    """Rows of ``tasks`` tasks, two clients to a task, each row with its own output."""

    def split(name, count):
        return [
            Row(output=f"{name} {t} {i}", task=f"task_{t}", client=f"{t}-{i % 2}")
            for i in range(count)
            for t in range(tasks)
        ]

    return {"train": split("train", train), "validation": [], "test": split("test", test)}


def run(rows, kind, num_clients=5, alpha=0.5, seed=0):
    return partition(rows, kind=kind, num_clients=num_clients, dirichlet_alpha=alpha, seed=seed)


def sizes(clients, split="train"):
    return [len(splits[split]) for splits in clients.values()]


@pytest.mark.parametrize("kind", PARTITIONS)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_row_belongs_to_exactly_one_client(kind, seed):
    rows = make_rows()
    clients = run(rows, kind, 0 if kind in ("client", "task") else 7, seed=seed)
    for split in rows:
        held = [row for splits in clients.values() for row in splits[split]]
        assert Counter(held) == Counter(rows[split])


@pytest.mark.parametrize("kind", PARTITIONS)
def test_clients_are_sorted_have_every_split_and_keep_the_order_of_rows(kind):
    rows = make_rows()
    clients = run(rows, kind, 4)
    assert list(clients) == sorted(clients)
    for splits in clients.values():
        assert set(splits) == set(rows)
        places = [rows["train"].index(row) for row in splits["train"]]
        assert places == sorted(places)


@pytest.mark.parametrize("kind", PARTITIONS)
def test_the_seed_alone_decides(kind):
    rows = make_rows(tasks=6)
    again = dict(reversed(list(rows.items())))
    assert str(run(rows, kind, 4, seed=3)) == str(run(again, kind, 4, seed=3))
    assert any(run(rows, kind, 4, seed=3) != run(rows, kind, 4, seed=s) for s in (4, 5, 6))


@pytest.mark.parametrize(("kind", "count"), [("client", 8), ("task", 4)])
def test_named_clients_are_those_of_the_rows(kind, count):
    clients = run(make_rows(), kind, 0)
    assert len(clients) == count
    for client_id, splits in clients.items():
        assert {getattr(row, kind) for rows in splits.values() for row in rows} == {client_id}


@pytest.mark.parametrize("kind", ["client", "task"])
def test_fewer_named_clients_are_whole_clients_and_nested(kind):
    rows = make_rows(tasks=9)
    everyone = run(rows, kind, 0)
    chosen = [run(rows, kind, count) for count in (2, 5, 9)]
    assert [len(clients) for clients in chosen] == [2, 5, 9]
    assert chosen[0].keys() < chosen[1].keys() < chosen[2].keys()
    assert all(everyone[name] == splits for name, splits in chosen[2].items())


def test_a_client_without_train_rows_stays_empty():
    rows = make_rows()
    rows["test"].append(Row(output="alone", client="zz", task="task_0"))
    clients = run(rows, "client", 0)
    assert clients["zz"] == {"train": [], "validation": [], "test": [rows["test"][-1]]}


def test_iid_sizes_differ_by_at_most_one_in_every_split():
    rows = make_rows()
    clients = run(rows, "iid", 7)
    assert list(clients) == [f"client_{i:03d}" for i in range(7)]
    for split in ("train", "test"):
        assert max(sizes(clients, split)) - min(sizes(clients, split)) <= 1


def test_ids_stay_in_order_beyond_a_thousand_clients():
    clients = run(make_rows(train=300), "iid", 1001)
    assert (
        list(clients)[:2] == ["client_0000", "client_0001"] and list(clients)[-1] == "client_1000"
    )


@pytest.mark.parametrize("alpha", [1e-6, 0.05, 1.0, 1e6])
def test_dirichlet_shares_of_a_task_are_the_same_in_every_split(alpha):
    """Each split gives a client floor or ceil of n * p, so the splits pin the same p."""
    rows = make_rows(tasks=3, train=400, test=100)
    clients = run(rows, "dirichlet", 6, alpha=alpha)
    for task in ("task_0", "task_1", "task_2"):
        for splits in clients.values():
            train = sum(row.task == task for row in splits["train"])
            test = sum(row.task == task for row in splits["test"])
            assert abs(train / 400 - test / 100) < 1 / 400 + 1 / 100


def test_dirichlet_alpha_runs_from_one_owner_per_task_to_even_shares():
    rows = make_rows(tasks=4, train=100)
    even = run(rows, "dirichlet", 5, alpha=1e6)
    assert all(abs(size - 80) <= 4 for size in sizes(even))
    skewed = run(rows, "dirichlet", 5, alpha=1e-6)
    owners = [
        sum(any(r.task == f"task_{t}" for r in c["train"]) for c in skewed.values())
        for t in range(4)
    ]
    assert owners == [1, 1, 1, 1]


def test_dirichlet_of_one_task_does_not_move_when_another_joins():
    small, large = make_rows(tasks=2), make_rows(tasks=3)

    def first_task(clients):
        return [[r.output for r in c["train"] if r.task == "task_0"] for c in clients.values()]

    assert first_task(run(small, "dirichlet")) == first_task(run(large, "dirichlet"))


def test_dirichlet_counts_follow_the_shares_where_rows_are_few():
    """Two test rows over ten clients: over seeds, each client is met equally often."""
    rows = {"train": make_rows()["train"], "test": make_rows(tasks=1, test=2)["test"]}
    met = Counter()
    for seed in range(300):
        clients = run(rows, "dirichlet", 10, alpha=1.0, seed=seed)
        met.update({name: len(splits["test"]) for name, splits in clients.items()})
    assert sum(met.values()) == 600 and min(met.values()) > 30 and max(met.values()) < 95


def test_row_order_inside_a_split_is_all_that_iid_reads():
    rows = make_rows()
    renamed = {s: [Row(output=r.output) for r in rs] for s, rs in rows.items()}
    texts = [[r.output for r in c["train"]] for c in run(rows, "iid").values()]
    assert texts == [[r.output for r in c["train"]] for c in run(renamed, "iid").values()]
    shuffled = random.Random(0).sample(rows["train"], len(rows["train"]))
    assert run(rows, "iid") != run({**rows, "train": shuffled}, "iid")


NAMELESS = {"train": [Row(output="a", client="c", task="t"), Row(output="b")]}


@pytest.mark.parametrize(
    ("rows", "kind", "options", "message"),
    [
        (make_rows(), "clients", {}, "data.partition is 'clients'.*Did you mean 'client'"),
        (make_rows(), "iid", {"num_clients": -1}, "clients.count is -1, expected 0"),
        (make_rows(), "iid", {"num_clients": 0}, "'iid' does not take the clients from the data"),
        (make_rows(), "dirichlet", {"num_clients": 0}, "at most 240, one per train row"),
        (make_rows(), "iid", {"num_clients": 241}, "is 241, but there are 240 train rows"),
        (make_rows(), "dirichlet", {"num_clients": 241}, "is 241, but there are 240 train rows"),
        (make_rows(), "client", {"num_clients": 9}, "is 9, but the rows name 8 under 'client'"),
        (make_rows(), "task", {"num_clients": 5}, "is 5, but the rows name 4 under 'task'"),
        (NAMELESS, "client", {}, r"1 of 2 train rows have no 'client' \(the first is row 2\)"),
        (NAMELESS, "task", {}, "1 of 2 train rows have no 'task'"),
        (NAMELESS, "dirichlet", {"num_clients": 1}, "1 of 2 train rows have no 'task'"),
        (make_rows(), "dirichlet", {"alpha": 0.0}, "dirichlet-alpha is 0.0, expected a number"),
        (make_rows(), "dirichlet", {"alpha": -1.0}, "dirichlet-alpha is -1.0"),
        (make_rows(), "dirichlet", {"alpha": float("nan")}, "dirichlet-alpha is nan"),
        (make_rows(), "dirichlet", {"alpha": float("inf")}, "dirichlet-alpha is inf"),
    ],
)
def test_impossible_partitions_are_refused(rows, kind, options, message):
    with pytest.raises(UserError, match=message) as caught:
        run(rows, kind, **options)
    assert "\n" not in str(caught.value)
