"""What a round sends: one start and one payload per rank class, one message per client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from flwr.app import Message, MessageType

from flexlora.aggregation.engine.method import Method
from flexlora.aggregation.engine.starts import Start
from flexlora.aggregation.engine.state import State
from flexlora.config.resolve import Config
from flexlora.lora.ranks import RankClass
from flexlora.server.members.roster import Member
from flexlora.server.settings import factoring_of
from flexlora.server.transport.messages import Payload, content_bytes, encode_train_job, pack
from flexlora.server.transport.retry_queue import REPORT_BYTES, PendingMessage
from flexlora.wire.encoding import encoded_bytes, over_the_wire

__all__ = ["RoundPlan"]


@dataclass(frozen=True, kw_only=True)
class RoundPlan:
    """One round of training as it is sent.

    Args:
        sent: the start of every rank class as its clients decode it.
        asked: the rank class of every client that is asked.
        class_bytes: the bytes of one message to each class.
        pending: every message, with its client; clients of a class share one payload.
    """

    server_round: int
    sent: dict[str, Start] = field(default_factory=dict)
    asked: dict[str, str] = field(default_factory=dict)
    class_bytes: dict[str, int] = field(default_factory=dict)
    pending: dict[PendingMessage, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        method: Method,
        state: State,
        members: Sequence[Member],
        config: Config,
        server_round: int,
        num_rounds: int,
        skipped: int,
        origin: str,
    ) -> RoundPlan:
        """The round after ``state``.

        ``skipped`` rounds before it do not count; ``origin`` is Flower's id of the first run in the
        folder.
        """
        classes = {m.rank_class.name: m.rank_class for m in members}
        starts = {
            name: method.start(state, rank_class, factoring_of(config))
            for name, rank_class in sorted(classes.items())
        }
        contents = {
            name: encode_train_job(
                start,
                _payloads(start, config.wire.dtype),
                server_round=server_round,
                num_server_rounds=num_rounds,
                skipped_rounds=skipped,
                fingerprint=members[0].capability.fingerprint,  # all members hold the same base
                origin=origin,
            )
            for name, start in starts.items()
        }
        most_bytes = {
            name: encoded_bytes(start.trained, config.wire.dtype, start.trainable) + REPORT_BYTES
            for name, start in starts.items()
        }
        pending = {
            PendingMessage(
                Message(
                    contents[member.rank_class.name],
                    dst_node_id=member.node_id,
                    message_type=MessageType.TRAIN,
                    group_id=str(server_round),
                ),
                most_bytes[member.rank_class.name],
            ): member.capability.client_id
            for member in members
        }
        return cls(
            server_round=server_round,
            sent={name: _as_received(s, config.wire.dtype) for name, s in starts.items()},
            asked={m.capability.client_id: m.rank_class.name for m in members},
            class_bytes={name: content_bytes(content) for name, content in contents.items()},
            pending=pending,
        )

    @staticmethod
    def starts(
        method: Method, state: State, classes: Mapping[str, RankClass], config: Config
    ) -> dict[str, Start]:
        """The starts of these rank classes as clients would decode them, whoever is asked."""
        factoring, dtype = factoring_of(config), config.wire.dtype
        return {
            name: _as_received(method.start(state, rank_class, factoring), dtype)
            for name, rank_class in classes.items()
        }

    @property
    def bytes_carried(self) -> int:
        """Of what is sent, the bytes of frozen factors."""
        return sum(self.sent[name].carried_bytes for name in self.asked.values())


def _payloads(start: Start, dtype: str) -> dict[str, Payload]:
    payloads = {"trained": pack(start.trained, dtype)}
    if start.carried is not None:
        payloads["carried"] = pack(start.carried, start.carried_dtype or dtype)
    return payloads


def _as_received(start: Start, dtype: str) -> Start:
    """The start as the client decodes it, which a residual form must subtract."""
    carried = start.carried
    if carried is not None:
        carried = over_the_wire(carried, start.carried_dtype or dtype)
    trained = over_the_wire(start.trained, dtype)
    return replace(start, trained=trained, carried=carried).sealed()
