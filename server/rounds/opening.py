"""What a round sends out: per rank class one start and one payload, per client one message."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from flwr.app import Message, MessageType, RecordDict

from flexlora.aggregation.engine.method import Method, Start, State
from flexlora.config.resolve import Config
from flexlora.server.members.roster import Member
from flexlora.server.settings import factoring_of
from flexlora.server.transport.messages import Payload, content_bytes, pack, train_content
from flexlora.wire.encoding import over_the_wire

__all__ = ["Opening"]


@dataclass(frozen=True, kw_only=True)
class Opening:
    """One round as it goes out: ``sent`` holds the starts by rank class as clients decode them."""

    server_round: int
    members: tuple[Member, ...]
    sent: dict[str, Start]
    contents: dict[str, RecordDict]

    @classmethod
    def of(
        cls,
        method: Method,
        state: State,
        members: Sequence[Member],
        config: Config,
        *,
        server_round: int,
        num_rounds: int,
        fingerprint: str,
        origin: str = "",
    ) -> Opening:
        """``fingerprint`` names the base that the factors are for, ``origin`` the run."""
        classes = {m.rank_class.name: m.rank_class for m in members}
        starts = {
            name: method.start(state, rank_class, factoring_of(config))
            for name, rank_class in sorted(classes.items())
        }
        contents = {
            name: train_content(
                start,
                _payloads(start, config.wire.dtype),
                server_round=server_round,
                num_server_rounds=num_rounds,
                fingerprint=fingerprint,
                origin=origin,
            )
            for name, start in starts.items()
        }
        return cls(
            server_round=server_round,
            members=tuple(members),
            sent={name: _as_received(s, config.wire.dtype) for name, s in starts.items()},
            contents=contents,
        )

    @property
    def asked(self) -> dict[str, str]:
        """The rank class of every client that is asked."""
        return {m.capability.client_id: m.rank_class.name for m in self.members}

    @property
    def class_bytes(self) -> dict[str, int]:
        """Bytes of one message to each class."""
        return {name: content_bytes(content) for name, content in self.contents.items()}

    @property
    def bytes_carried(self) -> int:
        return sum(self.sent[name].carried_bytes for name in self.asked.values())

    def messages(self) -> dict[str, Message]:
        """By client id; clients of a class share one payload."""
        return {
            member.capability.client_id: Message(
                self.contents[member.rank_class.name],
                dst_node_id=member.node_id,
                message_type=MessageType.TRAIN,
                group_id=str(self.server_round),
            )
            for member in self.members
        }


def _payloads(start: Start, dtype: str) -> dict[str, Payload]:
    payloads = {"trained": pack(start.trained, dtype)}
    if start.carried is not None:
        payloads["carried"] = pack(start.carried, start.carried_dtype or dtype)
    return payloads


def _as_received(start: Start, dtype: str) -> Start:
    """The start as the client decodes it: what a residual form must subtract."""
    carried = start.carried
    if carried is not None:
        carried = over_the_wire(carried, start.carried_dtype or dtype)
    trained = over_the_wire(start.trained, dtype)
    return replace(start, trained=trained, carried=carried).sealed()
