"""Flower messages in and out on the client's side: no training here, only names and bytes.

``decode_train(Message) -> TrainJob`` and ``encode_train(result, reply_to) -> Message``; the same
pair for evaluation and for the capability query. Each has a twin for a message's content alone,
which is what reaches a resident trainer. Nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, MutableMapping
from dataclasses import asdict

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from flexlora.aggregation.engine.starts import LocalPlan, Start
from flexlora.lora.adapters import Adapter
from flexlora.lora.ranks import RankClass
from flexlora.wire.encoding import FACTORS, decode_adapter, encode_adapter
from flexlora.wire.jobs import Capability, EvalJob, EvalResult, TrainJob, TrainResult

__all__ = [
    "capability_reply",
    "decode_evaluate",
    "decode_train",
    "encode_capability",
    "encode_evaluate",
    "encode_train",
    "evaluate_reply",
    "read_evaluate",
    "read_train",
    "train_reply",
]

Memo = MutableMapping[int, Adapter]


def decode_train(message: Message, client_id: str, memo: Memo | None = None) -> TrainJob:
    """The job in a train message. ``memo`` keeps what one payload, shared by a class, decodes to.

    Raises:
        UpdateRefused: arrays that are not what their names say.
    """
    return read_train(message.content, client_id, memo)


def read_train(content: Mapping, client_id: str, memo: Memo | None = None) -> TrainJob:
    """``decode_train`` of a message's content."""
    job = content["job"]
    start = Start(
        rank_class=RankClass.from_dict(json.loads(job["rank-class"])),
        base_round=job["base-round"],
        trained=_adapter(content, "trained", memo),
        carried=_adapter(content, "carried", memo) if "carried" in content else None,
        carried_dtype=job["carried-dtype"],
        trainable=tuple(job["trainable"]),
        local=LocalPlan(**json.loads(job["local"])),
    )
    return TrainJob(
        client_id=client_id,
        server_round=job["server-round"],
        num_server_rounds=job["num-server-rounds"],
        start=start.sealed(),
    )


def encode_train(
    result: TrainResult, *, dtype: str, reply_to: Message, start: Start | None = None
) -> Message:
    """The reply to a train message: the trained factors and a report, or the cause of neither.

    A factor that was not trained stays where it came from; int8 may send changes of the others.
    ``start`` is this one client's.
    """
    return Message(train_reply(result, dtype=dtype, start=start), reply_to=reply_to)


def train_reply(result: TrainResult, *, dtype: str, start: Start | None = None) -> RecordDict:
    """``encode_train`` without the message around it."""
    # Factors travel as arrays, and personal ones not at all.
    told = {key: value for key, value in vars(result).items() if key not in ("adapter", "personal")}
    report = {key.replace("_", "-"): value for key, value in told.items()}
    content: dict = {"report": ConfigRecord(report)}
    if result.adapter is not None:
        labels = start.trainable if start is not None else FACTORS
        held = start.trained if start is not None else None
        arrays, values = encode_adapter(result.adapter, dtype, labels, held)
        content["update"] = ArrayRecord({k: Array(**vars(array)) for k, array in arrays.items()})
        content["update.values"] = ConfigRecord(values)
    return RecordDict(content)


def decode_evaluate(message: Message, client_id: str, memo: Memo | None = None) -> EvalJob:
    """The job in an evaluate message: one adapter per rank class, or none for the bare base."""
    return read_evaluate(message.content, client_id, memo)


def read_evaluate(content: Mapping, client_id: str, memo: Memo | None = None) -> EvalJob:
    """``decode_evaluate`` of a message's content."""
    job = content["job"]
    return EvalJob(
        client_id=client_id,
        server_round=job["server-round"],
        adapters={name: _adapter(content, f"adapter/{name}", memo) for name in job["rank-classes"]},
        generate=job["generate"],
    )


def encode_evaluate(result: EvalResult, *, reply_to: Message) -> Message:
    """The reply to an evaluate message: one record of sums per rank class."""
    return Message(evaluate_reply(result), reply_to=reply_to)


def evaluate_reply(result: EvalResult) -> RecordDict:
    """``encode_evaluate`` without the message around it."""
    content = {"report": ConfigRecord({"client-id": result.client_id, "cause": result.cause})}
    for name, score in result.scores.items():
        content[f"score/{name}"] = ConfigRecord(asdict(score))
    return RecordDict(content)


def encode_capability(capability: Capability, *, reply_to: Message) -> Message:
    """The reply to a query: what this client is and what it holds."""
    return Message(capability_reply(capability), reply_to=reply_to)


def capability_reply(capability: Capability) -> RecordDict:
    """``encode_capability`` without the message around it."""
    values = {
        key.replace("_", "-"): list(value) if isinstance(value, tuple) else value
        for key, value in vars(capability).items()
    }
    return RecordDict({"capability": ConfigRecord(values)})


def _adapter(content: Mapping, name: str, memo: Memo | None) -> Adapter:
    record = content[name]
    if memo is None:
        return decode_adapter(record, content[f"{name}.values"])
    if id(record) not in memo:
        memo[id(record)] = decode_adapter(record, content[f"{name}.values"])
    return memo[id(record)]
