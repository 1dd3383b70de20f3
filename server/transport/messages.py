"""Encode jobs as Flower records, decode replies: the server's half of ``clients/messages.py``.

Payloads are built once per rank class and shared by all messages of the class: Flower stores
records by content, so they travel once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from flexlora.aggregation.engine.starts import Start
from flexlora.errors import UpdateRefused
from flexlora.lora.adapters import Adapter
from flexlora.wire.encoding import FACTORS, decode_adapter, encode_adapter
from flexlora.wire.jobs import Capability, EvalResult, Score, TrainResult

__all__ = [
    "Payload",
    "content_bytes",
    "decode_capability",
    "decode_eval_result",
    "decode_train_result",
    "encode_eval_job",
    "encode_train_job",
    "pack",
    "transient_cause",
]

LONGEST_CAUSE = 300  # characters of a transient cause


@dataclass(frozen=True, kw_only=True)
class Payload:
    """One adapter as records that messages share."""

    arrays: ArrayRecord
    values: ConfigRecord


def pack(adapter: Adapter, dtype: str) -> Payload:
    """The adapter as Flower records, raw bytes in the wire's dtype."""
    arrays, values = encode_adapter(adapter, dtype)
    return Payload(
        arrays=ArrayRecord({key: Array(**vars(array)) for key, array in arrays.items()}),
        values=ConfigRecord({**values}),
    )


def encode_train_job(
    start: Start,
    payloads: Mapping[str, Payload],
    *,
    server_round: int,
    num_server_rounds: int,
    fingerprint: str = "",
    origin: str = "",
) -> RecordDict:
    """The train message of a rank class; ``payloads`` has ``trained`` and maybe ``carried``.

    ``fingerprint`` names the base that the factors are for: a node with another base refuses.
    ``origin`` is Flower's id of the run that this one resumes, if any: a node goes on with what it
    stored under that id.
    """
    job = ConfigRecord(
        {
            "server-round": server_round,
            "num-server-rounds": num_server_rounds,
            "fingerprint": fingerprint,
            "origin": origin,
            "base-round": start.base_round,
            "rank-class": json.dumps(start.rank_class.to_dict()),
            "trainable": list(start.trainable),
            "carried-dtype": start.carried_dtype,
            "local": json.dumps(start.local.to_dict()),
        }
    )
    return RecordDict({"job": job, **_records(payloads)})


def encode_eval_job(
    payloads: Mapping[str, Payload],
    *,
    server_round: int,
    generate: bool,
    fingerprint: str = "",
    origin: str = "",
) -> RecordDict:
    """The evaluate message: one adapter per rank class, none for the bare base."""
    job = ConfigRecord(
        {
            "server-round": server_round,
            "generate": generate,
            "rank-classes": list(payloads),
            "fingerprint": fingerprint,
            "origin": origin,
        }
    )
    named = {f"adapter/{name}": payload for name, payload in payloads.items()}
    return RecordDict({"job": job, **_records(named)})


def _records(payloads: Mapping[str, Payload]) -> dict[str, ArrayRecord | ConfigRecord]:
    records: dict[str, ArrayRecord | ConfigRecord] = {}
    for name, payload in payloads.items():
        records[name], records[f"{name}.values"] = payload.arrays, payload.values
    return records


def content_bytes(content: RecordDict) -> int:
    """Bytes of all arrays in a message, as sent."""
    return sum(
        len(array.data) for record in content.array_records.values() for array in record.values()
    )


def transient_cause(reply: Message) -> str:
    """Why a node could not do what it was asked, where it says that this passes; else empty.

    The trainer restarts or has other work, the disk is full. Whatever else is in the reply is not
    read.
    """
    if reply.has_error() or not reply.has_content():
        return ""
    records = reply.content.config_records
    report = records.get("report") or records.get("capability")
    if report is None or report.get("transient") is not True:
        return ""
    cause = " ".join(str(report.get("cause", "")).split())[:LONGEST_CAUSE]
    return cause or "the node gives no cause"


def decode_capability(reply: Message) -> Capability:
    """A node's reply to the query; an error or unreadable reply is a capability with a cause."""
    if reply.has_error():
        return Capability.failed(f"node_{reply.metadata.src_node_id}", _error(reply))
    try:
        capability = Capability(**_fields(Capability, reply.content["capability"]))
        if not capability.cause and (not capability.shapes or capability.num_examples < 1):
            raise ValueError("no modules or no examples, and no cause")
        return capability
    except (KeyError, TypeError, ValueError) as error:
        cause = f"unreadable capability report: {error}"
        return Capability.failed(f"node_{reply.metadata.src_node_id}", cause)


def decode_train_result(reply: Message, start: Start | None = None) -> TrainResult:
    """A client's reply to a train message; factors that it did not train come from ``start``.

    Raises:
        UpdateRefused: an error reply or one that cannot be read, with its cause.
    """
    if reply.has_error():
        raise UpdateRefused(_error(reply))
    try:
        values = _fields(TrainResult, reply.content["report"])
        adapter = None
        if "update" in reply.content:
            scalings = reply.content.config_records["update.values"]
            adapter = decode_adapter(
                reply.content.array_records.get("update", {}),
                {key: value for key, value in scalings.items() if isinstance(value, list)},
                labels=start.trainable if start is not None else FACTORS,
                held=start.trained if start is not None else None,
            )
        result = TrainResult(**values, adapter=adapter)
        if adapter is not None and not math.isfinite(result.train_loss):
            raise ValueError(f"train-loss is {result.train_loss}")
        return result
    except (KeyError, TypeError, ValueError) as error:
        raise UpdateRefused(f"unreadable reply: {error}") from None


def decode_eval_result(reply: Message) -> EvalResult:
    """A client's reply to an evaluate message; an error becomes a result with a cause."""
    if reply.has_error():
        return EvalResult(client_id=f"node_{reply.metadata.src_node_id}", cause=_error(reply))
    try:
        report = reply.content["report"]
        scores = {
            name.removeprefix("score/"): Score(**_fields(Score, record))
            for name, record in reply.content.config_records.items()
            if name.startswith("score/")
        }
        odd = [n for s in scores.values() for n, v in vars(s).items() if not 0 <= v < math.inf]
        if odd:
            raise ValueError(f"'{odd[0]}' is negative or not finite")
        values = _fields(EvalResult, {k: report[k] for k in ("client-id", "cause")})
        return EvalResult(**values, scores=scores)
    except (KeyError, TypeError, ValueError) as error:
        cause = f"unreadable scores: {error}"
        return EvalResult(client_id=f"node_{reply.metadata.src_node_id}", cause=cause)


def _error(reply: Message) -> str:
    return f"Flower error {reply.error.code}: {reply.error.reason or 'no reason given'}"


def _fields(kind: type, record: Mapping) -> dict:
    """The record's values under the dataclass's names and types; lists become tuples.

    Raises:
        TypeError: a value of another type than the field's.
    """
    types = {field.name: str(field.type) for field in fields(kind)}
    values = {}
    for key, value in record.items():
        name = key.replace("-", "_")
        if name not in types:
            continue
        if isinstance(value, list):
            value = tuple(value)
        if not _is(types[name], value):
            raise TypeError(f"'{key}' is {value!r}, expected {types[name]}")
        values[name] = value
    return values


def _is(annotation: str, value: object) -> bool:
    if annotation.startswith("tuple["):
        inner = annotation.removeprefix("tuple[").split(",")[0]
        return isinstance(value, tuple) and all(_is(inner, item) for item in value)
    if annotation == "float":
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value).__name__ == annotation
