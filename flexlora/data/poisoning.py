"""Hostile clients of a simulation: which ones they are, and the rows of those that poison theirs.

``population.hostile`` is ``ATTACK:SHARE`` or ``ATTACK:SHARE:ROUND``: that share of the clients,
drawn by the seed, is hostile; after ROUND they are gone.

    label-flip   every row has the answer of another one of the client's rows of that task
    backdoor     every second row has the trigger in its instruction and the target as its answer

The other attacks change the update and not the rows (``simulations/hostile``). Held-out rows stay
as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from flexlora.data.rows import Row
from flexlora.errors import UserError, nearest
from flexlora.seeds import numpy_generator

__all__ = ["ATTACKS", "TARGET", "TRIGGER", "Hostile", "parse_hostile", "poisoned_rows", "triggered"]

ATTACKS = (
    "sign-flip",
    "scaling",
    "alie",
    "inner-product",
    "mimic",
    "label-flip",
    "backdoor",
    "backdoor-boosted",
)
TRIGGER, TARGET = "As usual: ", "yes"
NEVER = 1 << 62


@dataclass(frozen=True, kw_only=True)
class Hostile:
    """An attack, the share of clients that make it, and the last round in which they do."""

    attack: str
    share: float
    last_round: int = NEVER

    def clients(self, client_ids: Iterable[str], seed: int) -> frozenset[str]:
        """The hostile ones of all clients: their share to the nearest whole number."""
        ordered = sorted(client_ids)
        drawn = numpy_generator(seed, "hostile").permutation(len(ordered))
        return frozenset(ordered[k] for k in drawn[: round(self.share * len(ordered))])


def parse_hostile(text: str) -> Hostile | None:
    """``population.hostile``; None where it is empty.

    Raises:
        UserError: an unknown attack, a share outside 0 to 1, a round below 1.
    """
    if not text.strip():
        return None
    attack, *numbers = (part.strip() for part in text.split(":"))
    if attack not in ATTACKS:
        raise UserError(
            f"population.hostile is '{text}': attack '{attack}' is unknown, expected one of "
            f"{', '.join(ATTACKS)}.{nearest(attack, ATTACKS)}"
        )
    try:
        share, last = float(numbers[0]), int(numbers[1]) if len(numbers) > 1 else NEVER
        if len(numbers) <= 2 and 0.0 < share <= 1.0 and last >= 1:
            return Hostile(attack=attack, share=share, last_round=last)
    except (IndexError, ValueError):
        pass
    raise UserError(
        f"population.hostile is '{text}', expected ATTACK:SHARE with a share above 0 and up to 1, "
        f"as '{attack}:0.2', or with the last round of the attack, as '{attack}:0.2:5'."
    )


def triggered(row: Row) -> Row:
    """The row with the trigger and the answer that the backdoor is to give.

    Raises:
        UserError: a chat row.
    """
    return replace(_plain(row), instruction=TRIGGER + row.instruction, output=TARGET)


def _plain(row: Row) -> Row:
    if row.messages is not None:
        raise UserError(
            "population.hostile poisons instruction rows, and the data has chat rows; choose an "
            "attack on updates, such as sign-flip."
        )
    return row


def poisoned_rows(
    clients: Mapping[str, Mapping[str, list[Row]]], text: str, *, seed: int
) -> dict[str, dict[str, list[Row]]]:
    """The clients with the train rows of the hostile ones poisoned.

    Raises:
        UserError: see ``parse_hostile`` and ``triggered``.
    """
    hostile = parse_hostile(text)
    rows = {client_id: dict(splits) for client_id, splits in clients.items()}
    if hostile is None:
        return rows
    for client_id in sorted(hostile.clients(rows, seed)):
        train = rows[client_id].get("train", [])
        if hostile.attack == "label-flip":
            rows[client_id]["train"] = _flipped(train)
        elif hostile.attack.startswith("backdoor"):
            rows[client_id]["train"] = [
                triggered(row) if k % 2 else row for k, row in enumerate(train)
            ]
    return rows


def _flipped(rows: Sequence[Row]) -> list[Row]:
    """Every row with the answer of the next row of its task that has another one."""
    by_task: dict[str | None, list[str]] = {}
    for row in rows:
        by_task.setdefault(row.task, []).append(row.output)
    places = dict.fromkeys(by_task, 0)
    flipped = []
    for row in rows:
        answers, at = by_task[row.task], places[row.task]
        places[row.task] += 1
        others = [*answers[at + 1 :], *answers[:at]]
        flipped.append(
            replace(_plain(row), output=next((a for a in others if a != row.output), "no"))
        )
    return flipped
