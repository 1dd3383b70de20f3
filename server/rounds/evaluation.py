"""Evaluation: every rank class's adapter to the evaluating clients; their scores as metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from flwr.app import Message, MessageType

from flexlora.config.resolve import Config
from flexlora.evaluation.evaluate import BASE
from flexlora.evaluation.metrics import means
from flexlora.lora.adapters import Adapter
from flexlora.printable import printable
from flexlora.server.members.roster import Roster, sample
from flexlora.server.transport.messages import decode_eval_result, encode_eval_job, pack
from flexlora.wire.jobs import PERSONAL, EvalResult, Score

__all__ = ["eval_metrics", "evaluation_messages", "evaluation_results", "evaluation_rows"]


def evaluation_messages(
    served: Mapping[str, Adapter],
    roster: Roster,
    config: Config,
    server_round: int,
    num_rounds: int,
    origin: str,
) -> list[Message]:
    """To the same clients in every round, each with every class's adapter (round 0: none)."""
    count = max(1, round(config.eval.fraction * len(roster.members)))
    chosen = sample(roster.members, count, seed=config.seed, purpose=("evaluate",))
    payloads = {name: pack(adapter, config.wire.dtype) for name, adapter in served.items()}
    content = encode_eval_job(
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
    replies: Iterable[Message],
    roster: Roster,
    config: Config,
    on_evaluated: Callable[[str, str], None],
) -> list[EvalResult]:
    """The members' results, one per client; ``on_evaluated`` gets each client and its cause.

    A result that no evaluation of this run can have is that client's failure and has no scores.
    """
    by_node = {member.node_id: member for member in roster.members.values()}
    results: dict[str, EvalResult] = {}
    for reply in replies:
        member = by_node.get(reply.metadata.src_node_id)
        if member is None or member.capability.client_id in results:
            continue
        result, client_id = decode_eval_result(reply), member.capability.client_id
        if not result.cause and result.client_id != client_id:
            result = EvalResult(client_id=client_id, cause=f"replied as '{result.client_id}'")
        if odd := _impossible(result, roster, config):
            result = EvalResult(client_id=client_id, cause=odd)
        results[client_id] = replace(result, client_id=client_id)
        on_evaluated(client_id, result.cause)
    return list(results.values())


def _impossible(result: EvalResult, roster: Roster, config: Config) -> str:
    """Why the scores cannot be those of this run's rows; empty if they can."""
    known = {*roster.rank_classes, BASE, PERSONAL}
    for name, score in result.scores.items():
        if name not in known:
            return f"scores of '{printable(name, 40)}', which was not sent"
        most = config.eval.max_examples or score.rows
        if score.rows > most:
            return f"{score.rows} rows under '{name}', eval.max-examples is {most}"
        if score.tokens > score.rows * config.train.max_length:
            return (
                f"{score.tokens} tokens in {score.rows} rows under '{name}', train.max-length is "
                f"{config.train.max_length}"
            )
    return ""


def eval_metrics(results: Sequence[EvalResult], roster: Roster) -> dict[str, float]:
    """Every metric that the rows have, per rank class and over clients each at the client's class.

    ``eval_loss`` is over the rows of every client under the adapter of its own rank class,
    ``eval_loss/CLASS`` over all rows under the adapter of CLASS. Where clients have personal
    factors, ``eval_loss/personal`` is with them, and ``eval_loss/global_of_personal`` without them
    on the same clients' rows.
    """
    per_class = dict.fromkeys(roster.rank_classes, Score())
    total, personal, without = Score(), Score(), Score()
    with_personal = 0
    for result in results:
        if result.client_id not in roster.members or not result.scores:
            continue
        everywhere = result.scores.get(BASE)
        for name in per_class:
            per_class[name] += everywhere or result.scores.get(name, Score())
        own_class = roster.members[result.client_id].rank_class.name
        served = everywhere or result.scores.get(own_class, Score())
        total += served
        if PERSONAL in result.scores and served.rows:
            with_personal += 1
            personal += result.scores[PERSONAL]
            without += served
    named = {PERSONAL: personal, f"global_of_{PERSONAL}": without} if with_personal else {}
    metrics = dict(_means("", total))
    for name, score in (per_class | named).items():
        metrics |= dict(_means(f"/{name}", score))
    return metrics | ({"personal_clients": with_personal} if with_personal else {})


def _means(suffix: str, score: Score) -> list[tuple[str, float]]:
    return [(f"eval_{key}{suffix}", value) for key, value in means(score).items()]


def evaluation_rows(server_round: int, results: Sequence[EvalResult]) -> list[dict[str, object]]:
    """One row per client and rank class for ``evaluation.csv``."""
    rows = []
    for result in sorted(results, key=lambda r: r.client_id):
        for name, score in result.scores.items():
            row = {"round": server_round, "client_id": result.client_id, "rank_class": name}
            rows.append(row | dict(_means("", score)) | {"rows": score.rows})
    return rows
