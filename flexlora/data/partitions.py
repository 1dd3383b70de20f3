"""Partitions of rows over clients, consistent across splits.

    client     by the rows' ``client``
    task       one client per task
    iid        at random, in equal sizes
    dirichlet  p_t ~ Dirichlet(alpha * 1) for each task t, the shares of its rows that go to each
               client (label skew after Hsu et al., arXiv 1909.06335, with tasks for labels)

The shares p_t are drawn once per seed for all splits: a client is evaluated on the mixture of tasks
that it trains on. Every row of every split goes to exactly one client, unless ``num_clients`` is
below the number of clients that the rows name. The result includes clients without train rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from flexlora.data.rows import Row
from flexlora.errors import UserError, nearest
from flexlora.seeds import numpy_generator

__all__ = ["PARTITIONS", "partition"]

PARTITIONS = ("client", "task", "iid", "dirichlet")

Splits = Mapping[str, Sequence[Row]]


def partition(
    rows: Splits, *, kind: str, num_clients: int, dirichlet_alpha: float, seed: int
) -> dict[str, dict[str, list[Row]]]:
    """``{client_id: {split: rows}}``, sorted by client id; rows keep the order of their split.

    With ``num_clients`` 0, ``client`` and ``task`` return every client that the data names. Fewer
    are a seeded choice among them, and a larger number includes the smaller one's clients.

    Raises:
        UserError: an unknown kind, rows without the client or task that the kind needs, more
            clients than the data can fill, none for ``iid`` or ``dirichlet``, or an alpha
            outside 1e-6 to 1e6.
    """
    if kind not in PARTITIONS:
        raise UserError(
            f"data.partition is '{kind}', expected one of {', '.join(PARTITIONS)}."
            f"{nearest(kind, PARTITIONS)}"
        )
    if num_clients < 0:
        raise UserError(f"clients.count is {num_clients}, expected 0 (all) or more; raise it.")
    rows = {split: rows[split] for split in sorted(rows)}
    if kind in ("client", "task"):
        return _by_name(rows, kind, num_clients, seed)
    _check_count(rows, kind, num_clients)
    if kind == "iid":
        owners = {split: _deal(split, len(rows[split]), num_clients, seed) for split in rows}
    else:
        owners = _dirichlet_owners(rows, num_clients, dirichlet_alpha, seed)
    width = max(3, len(str(num_clients - 1)))
    ids = [f"client_{index:0{width}d}" for index in range(num_clients)]
    return _gather(rows, {split: [ids[i] for i in owner] for split, owner in owners.items()}, ids)


def _by_name(rows: Splits, kind: str, num_clients: int, seed: int) -> dict:
    """Clients named by the ``client`` or ``task`` of the rows."""
    owners = {split: _names(rows[split], split, kind) for split in rows}
    ids = sorted({name for names in owners.values() for name in names})
    if num_clients > len(ids):
        raise UserError(
            f"clients.count is {num_clients}, but the rows name {len(ids)} under '{kind}'; ask "
            "for at most that many (0 for all), or use data.partition 'iid' or 'dirichlet'."
        )
    if num_clients:
        order = numpy_generator(seed, "partition", kind).permutation(len(ids))
        ids = sorted(ids[index] for index in order[:num_clients])
    return _gather(rows, owners, ids)


def _names(rows: Sequence[Row], split: str, kind: str) -> list[str]:
    """The client or task of each row of a split."""
    names = [getattr(row, kind) for row in rows]
    missing = [number for number, name in enumerate(names, start=1) if name is None]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(names)} {split} rows have no '{kind}' (the first is row "
            f"{missing[0]}), expected one in every row; add it or use data.partition 'iid'."
        )
    return names


def _check_count(rows: Splits, kind: str, num_clients: int) -> None:
    num_rows = len(rows.get("train", ()))
    if num_clients == 0:
        raise UserError(
            f"clients.count is 0, but data.partition '{kind}' does not take the clients from the "
            f"data; say how many there are (at most {num_rows}, one per train row)."
        )
    if num_clients > num_rows:
        raise UserError(
            f"clients.count is {num_clients}, but there are {num_rows} train rows; ask for at "
            "most one client per train row."
        )


def _deal(split: str, num_rows: int, num_clients: int, seed: int) -> list[int]:
    """The client of each row, at random, with sizes that differ by at most one."""
    owners = [0] * num_rows
    order = numpy_generator(seed, "partition", "iid", split).permutation(num_rows)
    for position, index in enumerate(order):
        owners[index] = position % num_clients
    return owners


def _dirichlet_owners(
    rows: Splits, num_clients: int, alpha: float, seed: int
) -> dict[str, list[int]]:
    """The client of each row of each split, from shares drawn once per task."""
    if not 1e-6 <= alpha <= 1e6:  # outside, the draw's gamma variates under- or overflow
        raise UserError(
            f"data.dirichlet-alpha is {alpha}, expected a number from 1e-6 to 1e6 (0.1 is very "
            "uneven, 100 nearly even); change it."
        )
    owners = {split: [0] * len(rows[split]) for split in rows}
    places: dict[str, list[tuple[str, list[int]]]] = defaultdict(list)
    for split in rows:
        of_task = defaultdict(list)
        for index, task in enumerate(_names(rows[split], split, "task")):
            of_task[task].append(index)
        for task, indices in of_task.items():
            places[task].append((split, indices))
    for task in sorted(places):
        draw = numpy_generator(seed, "partition", "dirichlet", task)
        edges = draw.dirichlet([alpha] * num_clients).cumsum()
        for split, indices in places[task]:
            deal = numpy_generator(seed, "partition", "dirichlet", task, split)
            # Systematic sampling: client k gets floor or ceil of n * p_k of the n rows, and
            # n * p_k on average even where n is far below the number of clients.
            marks = (deal.permutation(len(indices)) + deal.random()) / len(indices) * edges[-1]
            chosen = edges.searchsorted(marks, side="right").clip(max=num_clients - 1)
            for index, client in zip(indices, chosen, strict=True):
                owners[split][index] = int(client)
    return owners


def _gather(rows: Splits, owners: Mapping[str, Sequence[str]], ids: Sequence[str]) -> dict:
    """The rows by client and split, for the clients in ``ids``."""
    clients: dict[str, dict[str, list[Row]]] = {
        client_id: {split: [] for split in rows} for client_id in ids
    }
    for split, names in owners.items():
        for row, name in zip(rows[split], names, strict=True):
            if name in clients:
                clients[name][split].append(row)
    return clients
