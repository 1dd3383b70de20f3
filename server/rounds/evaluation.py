"""Evaluation: encode every rank class's adapter for the evaluating clients, decode their scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from flwr.app import Message, MessageType

from flexlora.lora.adapters import Adapter
from flexlora.server.members.roster import Roster, sample
from flexlora.server.settings import ServerSettings
from flexlora.server.transport.messages import decode_eval_result, encode_eval_job, pack
from flexlora.wire.jobs import EvalResult

__all__ = ["evaluation_messages", "evaluation_results"]


def evaluation_messages(
    served: Mapping[str, Adapter],
    roster: Roster,
    settings: ServerSettings,
    *,
    server_round: int,
    num_rounds: int,
    origin: str = "",
) -> list[Message]:
    """To the same clients in every round, each with every class's adapter (round 0: none)."""
    count = max(1, round(settings.eval_fraction * len(roster.members)))
    chosen = sample(roster.members, count, seed=settings.seed, purpose=("evaluate",))
    payloads = {
        name: pack(adapter, settings.wire_dtype)
        for name, adapter in served.items()
        if server_round > 0
    }
    content = encode_eval_job(
        payloads,
        server_round=server_round,
        generate=settings.generates(server_round, num_rounds),
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
    replies: Iterable[Message], roster: Roster, on_evaluated: Callable[[str, str], None]
) -> list[EvalResult]:
    """The members' results, one per client; ``on_evaluated`` gets each client and its cause."""
    by_node = {member.node_id: member for member in roster.members.values()}
    results: dict[str, EvalResult] = {}
    for reply in replies:
        member = by_node.get(reply.metadata.src_node_id)
        if member is None or member.capability.client_id in results:
            continue
        result, client_id = decode_eval_result(reply), member.capability.client_id
        if not result.cause and result.client_id != client_id:
            result = EvalResult(client_id=client_id, cause=f"replied as '{result.client_id}'")
        results[client_id] = replace(result, client_id=client_id)
        on_evaluated(client_id, result.cause)
    return list(results.values())
