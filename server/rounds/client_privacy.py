"""What the clients have spent under ``privacy.mode=local`` or ``example``, as the server knows it.

The noise is the clients' own, and so is the budget: each refuses what would exceed it. The server
counts whose factors it got, which with the number of rows and the noise, all public, is epsilon. It
is in the checkpoint; a resumed simulation, whose clients are in this process, gives it to them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

from flwr.serverapp import Grid

from flexlora.config.resolve import Config
from flexlora.privacy.client_rounds import ClientLedgers
from flexlora.server.members.roster import Roster
from flexlora.server.rounds.client_rows import ClientRow

__all__ = ["ClientPrivacy"]


class ClientPrivacy:
    """The ledgers of the clients whose updates came; does nothing under other modes."""

    def __init__(self, config: Config) -> None:
        self.ledgers = ClientLedgers(config)
        self.active = self.ledgers.active

    def metrics(self, rows: Iterable[ClientRow], roster: Roster) -> dict[str, float]:
        """Enter a round's rows; the largest and the median epsilon of those that took part so far.

        An update counts once it was decoded, whether it was used, late or refused.
        """
        for row in rows if self.active else ():
            if row.update_digest:
                member = roster.members[row.client_id]
                self.ledgers.spend(row.client_id, member.capability.num_examples)
        spent = self.ledgers.epsilons().values()
        return {"epsilon": max(spent), "epsilon_median": median(spent)} if spent else {}

    def to_dict(self) -> dict[str, Any]:
        """For the notes of a checkpoint."""
        return self.ledgers.to_dict()

    def restore(self, values: Mapping[str, Any], grid: Grid) -> None:
        """The ledgers of a checkpoint, also to the clients of a simulation."""
        self.ledgers.restore(values)
        simulated = getattr(grid, "client_ledgers", None)
        if isinstance(simulated, ClientLedgers):
            simulated.restore(values)
