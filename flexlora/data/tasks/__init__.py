"""The built-in tasks: sixteen families, one known and one held-out for each category.

``FAMILIES`` names them all; ``generate_rows`` draws rows of one; ``embedded_rows`` is the default
federation. Pretraining (``flexlora.simulations.make_base``) reads the known half only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexlora.data.tasks.family import Family, draw_rows, split_of
from flexlora.data.tasks.federation import federate
from flexlora.data.tasks.held_out import HELD_OUT
from flexlora.data.tasks.known import KNOWN
from flexlora.errors import UserError, nearest

if TYPE_CHECKING:
    from flexlora.data.rows import Row

__all__ = [
    "DEFAULT",
    "FAMILIES",
    "Family",
    "choose_families",
    "embedded_rows",
    "generate_rows",
    "split_of",
]

FAMILIES: dict[str, Family] = {family.name: family for family in (*KNOWN, *HELD_OUT)}

# Four known and four held-out families that a federation of one minute can learn. The others need
# more steps or more rank: see the rank table in simulations/README.md; ``data.tasks=all`` has all.
DEFAULT = (
    "reverse_word",
    "station_number",
    "plural",
    "date",
    "past_tense",
    "rotate_list",
    "size_class",
    "tallest",
)


def generate_rows(family: str, split: str, count: int, seed: int) -> list[Row]:
    """``count`` rows of one family and split, without a client; a pure function of its arguments.

    Raises:
        UserError: unknown family or split, or more rows asked for than the family has inputs.
    """
    if family not in FAMILIES:
        raise UserError(f"Task '{family}' is unknown.{nearest(family, FAMILIES)}")
    return draw_rows(FAMILIES[family], split=split, count=count, seed=seed)


def choose_families(tasks: str) -> list[Family]:
    """``default``, ``all``, or names separated by commas.

    Raises:
        UserError: an unknown family, or none.
    """
    names = {"default": DEFAULT, "all": tuple(FAMILIES)}.get(tasks)
    if names is None:
        names = tuple(item.strip() for item in tasks.split(","))
    for name in names:
        if name not in FAMILIES:
            known = ("default", "all", *FAMILIES)
            raise UserError(
                f"data.tasks has '{name}', expected default, all, or names among "
                f"{', '.join(FAMILIES)}.{nearest(name, known)}"
            )
    return [FAMILIES[name] for name in names]


def embedded_rows(
    num_clients: int = 24, seed: int = 0, tasks: str = "default"
) -> dict[str, list[Row]]:
    """A federation over the families of ``tasks`` by split; see ``federation.federate``."""
    return federate(choose_families(tasks), num_clients=num_clients, seed=seed)
