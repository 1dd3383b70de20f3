"""The embedded world's tasks: sixteen families, one known and one held-out for each category.

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

__all__ = ["FAMILIES", "Family", "embedded_rows", "generate_rows", "split_of"]

FAMILIES: dict[str, Family] = {family.name: family for family in (*KNOWN, *HELD_OUT)}


def generate_rows(family: str, split: str, count: int, seed: int) -> list[Row]:
    """``count`` rows of one family and split, without a client; a pure function of its arguments.

    Raises:
        UserError: unknown family or split, or more rows asked for than the family has inputs.
    """
    if family not in FAMILIES:
        raise UserError(f"Task '{family}' is unknown.{nearest(family, FAMILIES)}")
    return draw_rows(FAMILIES[family], split=split, count=count, seed=seed)


def embedded_rows(num_clients: int = 24, seed: int = 0) -> dict[str, list[Row]]:
    """The default federation by split: see ``flexlora.data.tasks.federation.federate``."""
    return federate(list(FAMILIES.values()), num_clients=num_clients, seed=seed)
