"""Tasks and clients that a run does not train on, so that an evaluation can score unseen ones.

    data.held-out-tasks   tasks or categories by name, separated by ';': nobody trains on their rows
    clients.held-out      share of the clients, drawn from the seed, that train on nothing

Only train rows are taken away. A client that is left without any is not part of the run; its
validation and test rows stay for ``flexlora eval``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from flexlora.data.rows import Row
from flexlora.errors import UserError, nearest
from flexlora.seeds import numpy_generator

__all__ = ["check_held_out", "held_out_names", "without_held_out"]

Clients = Mapping[str, Mapping[str, list[Row]]]


def held_out_names(text: str) -> frozenset[str]:
    """The tasks and categories of ``data.held-out-tasks``."""
    return frozenset(name for part in text.split(";") if (name := part.strip()))


def without_held_out(
    clients: Clients, tasks: str, share: float, *, seed: int
) -> dict[str, dict[str, list[Row]]]:
    """The clients without the train rows of held-out tasks, and of a ``share`` of the clients.

    That is ``floor(share * N)`` of the N clients that have train rows then.
    """
    names = held_out_names(tasks)
    if not names and not share:
        return {client_id: dict(splits) for client_id, splits in clients.items()}
    kept = {
        client_id: {**splits, "train": [r for r in splits.get("train", []) if not _is(r, names)]}
        for client_id, splits in clients.items()
    }
    holding = [client_id for client_id, splits in kept.items() if splits["train"]]
    order = numpy_generator(seed, "held-out clients").permutation(len(holding))
    for index in order[: int(share * len(holding))]:
        kept[holding[index]]["train"] = []
    return kept


def check_held_out(clients: Clients, tasks: str) -> None:
    """Refuse names that no row of the data has, and a choice that leaves nothing to train on.

    Not for a node, which has some tasks of many.

    Raises:
        UserError: naming them, with the nearest known name.
    """
    rows = [row for splits in clients.values() for split in splits.values() for row in split]
    known = {name for row in rows for name in (row.task, row.category) if name}
    for name in sorted(held_out_names(tasks) - known):
        of_rows = f"one of the {len(known)} that the rows name" if known else "rows that name any"
        raise UserError(
            f"data.held-out-tasks has '{name}', which is no task or category of the data, "
            f"expected {of_rows}, separated by ';'.{nearest(name, known)}"
        )
    names = held_out_names(tasks)
    if names and all(_is(row, names) for row in _train(clients)):
        raise UserError(
            f"data.held-out-tasks is '{tasks}', which holds out every train row; name fewer tasks."
        )


def _train(clients: Clients) -> Iterable[Row]:
    return (row for splits in clients.values() for row in splits.get("train", []))


def _is(row: Row, names: frozenset[str]) -> bool:
    return row.task in names or row.category in names
