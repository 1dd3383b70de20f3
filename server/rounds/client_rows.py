"""One client's row of ``clients.csv``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from flexlora.runs.outcomes import Outcome
from flexlora.server.members.roster import Member
from flexlora.wire.jobs import TrainResult

__all__ = ["ClientRow", "left_out_rows"]


@dataclass(kw_only=True)
class ClientRow:
    """What one client was sent, sent back and took in one round; None and NaN are empty cells.

    ``late`` marks the reply to a message of an earlier round. ``note`` follows the cause in the
    table and is not passed to observers: how often a message was sent, what an update weighs.
    """

    round: int
    client_id: str
    outcome: Outcome
    cause: str = ""
    note: str = ""
    late: bool = False
    discount: float = 1.0
    rank_class: str = ""
    rank: int | None = None
    quantization: str = ""
    device: str = ""
    num_examples: int | None = None
    train_loss: float = math.nan
    loss_before: float = math.nan
    loss_after: float = math.nan
    bytes_down: int | None = None
    bytes_up: int | None = None
    seconds: float = math.nan
    simulated_seconds: float = math.nan
    joules: float = math.nan
    node_id: int | None = None
    update_digest: str = ""
    base_round: int | None = None

    @classmethod
    def of(cls, member: Member, server_round: int, outcome: Outcome, cause: str) -> ClientRow:
        """The row of a member before anything is known of its training."""
        return cls(
            round=server_round,
            client_id=member.capability.client_id,
            outcome=outcome,
            cause=cause,
            rank_class=member.rank_class.name,
            rank=member.rank_class.rank,
            quantization=member.capability.quantization,
            device=member.capability.device,
            num_examples=member.capability.num_examples,
            bytes_down=0,
            bytes_up=0,
            node_id=member.node_id,
        )

    def add_result(self, result: TrainResult) -> None:
        """Fill in what the client reports of its training; without a step it has no losses."""
        self.num_examples, self.seconds = result.num_examples, result.train_seconds
        if result.steps or result.adapter is None:
            self.train_loss = result.train_loss
            self.loss_before, self.loss_after = result.loss_before, result.loss_after
        self.base_round = result.base_round
        self.update_digest = result.adapter.digest() if result.adapter is not None else ""

    @property
    def has_loss(self) -> bool:
        """Whether it reports a training loss; a client that adds noise withholds it."""
        return not math.isnan(self.train_loss)

    def logged(self) -> dict[str, object]:
        """The client's part in the round, for the audit log."""
        return {
            "client_id": self.client_id,
            "node_id": None if self.node_id is None else str(self.node_id),
            "outcome": self.outcome.value,
            "update": self.update_digest,
            "num_examples": self.num_examples,
            "weight": self.discount if self.outcome is Outcome.OK else 0.0,
            "rank_class": self.rank_class,
            "base_round": self.base_round,
        }

    def cells(self) -> dict[str, object]:
        """By column; ``RunFolder`` takes the columns of ``clients.csv`` from it."""
        cause = "; ".join(filter(None, (self.cause, self.note)))
        return {**vars(self), "status": self.outcome.status, "cause": cause}


def left_out_rows(server_round: int, causes: Mapping[str, str]) -> list[ClientRow]:
    """The clients that take no part, each with its cause."""
    return [
        ClientRow(round=server_round, client_id=name, outcome=Outcome.LEFT_OUT, cause=cause)
        for name, cause in sorted(causes.items())
    ]
