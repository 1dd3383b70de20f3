"""Evaluation: every class's adapter out to the clients that evaluate, their scores back in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from flwr.app import Message, MessageType

from flexlora.config.resolve import Config
from flexlora.lora.adapters import Adapter
from flexlora.server.members.roster import Roster, sample
from flexlora.server.transport.messages import decode_evaluate, eval_content, pack
from flexlora.wire.jobs import EvalResult

__all__ = ["evaluation_messages", "evaluation_results"]


def evaluation_messages(
    served: Mapping[str, Adapter],
    roster: Roster,
    config: Config,
    *,
    server_round: int,
    num_rounds: int,
    origin: str = "",
) -> list[Message]:
    """The same clients every time, each with every class's adapter (round 0: none)."""
    count = max(1, round(config.eval.fraction * len(roster.members)))
    chosen = sample(roster.members, count, seed=config.seed, purpose=("evaluate",))
    payloads = {
        name: pack(adapter, config.wire.dtype)
        for name, adapter in served.items()
        if server_round > 0
    }
    content = eval_content(
        payloads,
        server_round=server_round,
        generate=config.eval.generates(server_round, num_rounds),
        fingerprint=roster.fingerprint,
        origin=origin,
    )
    return [
        Message(
            content,
            dst_node_id=roster.members[client_id].node_id,
            message_type=MessageType.EVALUATE,
            group_id=str(server_round),
        )
        for client_id in chosen
    ]


def evaluation_results(
    replies: Iterable[Message], roster: Roster, *, told: Callable[[EvalResult], None]
) -> list[EvalResult]:
    """What the members among the senders answered, each counting as itself and once."""
    by_node = {member.node_id: member for member in roster.members.values()}
    results: dict[str, EvalResult] = {}
    for reply in replies:
        result = decode_evaluate(reply)
        member = by_node.get(reply.metadata.src_node_id)
        if member is None or member.capability.client_id in results:
            continue
        client_id = member.capability.client_id
        if not result.cause and result.client_id != client_id:
            result = EvalResult(client_id=client_id, cause=f"replied as '{result.client_id}'")
        results[client_id] = replace(result, client_id=client_id)
        told(results[client_id])
    return list(results.values())
