"""Encode jobs as Flower records, decode replies: the server's half of ``clients/messages.py``.

Payloads are built once per rank class and shared by all messages of the class: Flower stores
records by content, so they travel once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from flexlora.aggregation.engine.starts import Start
from flexlora.errors import UpdateRefused, reason
from flexlora.lora.adapters import Adapter
from flexlora.printable import printable
from flexlora.server.transport.fields import check_capability, check_score, read_fields
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
]


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


def decode_capability(reply: Message) -> Capability:
    """A node's reply to the query; an error or unreadable reply is a capability with a cause."""
    if reply.has_error():
        return Capability.failed(f"node_{reply.metadata.src_node_id}", _error(reply))
    try:
        record = reply.content["capability"]
        capability = Capability(**read_fields(Capability, record))
        check_capability(record, capability)
        return capability
    except Exception as error:  # whatever it is, the node sent it
        cause = f"unreadable capability report: {_words(error)}"
        return Capability.failed(f"node_{reply.metadata.src_node_id}", cause)


def decode_train_result(reply: Message, start: Start | None = None) -> TrainResult:
    """A client's reply to a train message; factors that it did not train come from ``start``.

    Raises:
        UpdateRefused: an error reply or one that cannot be read, with its cause.
    """
    if reply.has_error():
        raise UpdateRefused(_error(reply))
    try:
        values = read_fields(TrainResult, reply.content["report"])
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
    except Exception as error:  # whatever it is, the node sent it
        raise UpdateRefused(f"unreadable reply: {_words(error)}") from None


def decode_eval_result(reply: Message) -> EvalResult:
    """A client's reply to an evaluate message; an error becomes a result with a cause."""
    if reply.has_error():
        return EvalResult(client_id=f"node_{reply.metadata.src_node_id}", cause=_error(reply))
    try:
        report = reply.content["report"]
        scores = {
            name.removeprefix("score/"): Score(**read_fields(Score, record))
            for name, record in reply.content.config_records.items()
            if name.startswith("score/")
        }
        for name, score in scores.items():
            check_score(name, score)
        values = read_fields(EvalResult, {k: report[k] for k in ("client-id", "cause")})
        return EvalResult(**values, scores=scores)
    except Exception as error:  # whatever it is, the node sent it
        cause = f"unreadable scores: {_words(error)}"
        return EvalResult(client_id=f"node_{reply.metadata.src_node_id}", cause=cause)


def _error(reply: Message) -> str:
    words = printable(reply.error.reason or "no reason given", 1000)
    return f"Flower error {reply.error.code}: {words}"


def _words(error: Exception) -> str:
    return printable(reason(error), 1000)
