"""Encode jobs as Flower records, decode replies: the server's half of ``clients/messages.py``.

A message holds two records: values, and at most one array with all its adapters (``packing.py``).
A content is built once per rank class and shared by all messages of the class: Flower stores
records by content, so that they travel once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from flexlora.aggregation.engine.starts import Start
from flexlora.errors import UpdateRefused, reason
from flexlora.lora.adapters import Adapter
from flexlora.printable import printable
from flexlora.server.transport.fields import check_capability, check_score, read_fields
from flexlora.server.transport.flower_private import UNREADABLE
from flexlora.wire.encoding import FACTORS, WireArray, decode_adapter, encode_adapter
from flexlora.wire.jobs import Capability, EvalResult, Score, TrainResult
from flexlora.wire.packing import (
    DATA,
    PACKED,
    VERSION_KEY,
    WIRE_VERSION,
    pack_adapters,
    unpack_adapters,
)

__all__ = [
    "Payload",
    "content_bytes",
    "decode_capability",
    "decode_eval_result",
    "decode_train_result",
    "encode_eval_job",
    "encode_train_job",
    "error_words",
    "pack",
    "transient_cause",
    "words_of",
]

LONGEST_CAUSE = 300  # characters of a transient cause


@dataclass(frozen=True, kw_only=True)
class Payload:
    """One adapter as it is encoded for the wire."""

    arrays: Mapping[str, WireArray]
    values: Mapping[str, list]


def pack(adapter: Adapter, dtype: str) -> Payload:
    """The adapter's factors, raw bytes in the wire's dtype."""
    arrays, values = encode_adapter(adapter, dtype)
    return Payload(arrays=arrays, values=values)


def encode_train_job(
    start: Start,
    payloads: Mapping[str, Payload],
    *,
    server_round: int,
    num_server_rounds: int,
    skipped_rounds: int = 0,
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
            VERSION_KEY: WIRE_VERSION,
            "server-round": server_round,
            "num-server-rounds": num_server_rounds,
            "skipped-rounds": skipped_rounds,
            "fingerprint": fingerprint,
            "origin": origin,
            "base-round": start.base_round,
            "rank-class": json.dumps(start.rank_class.to_dict()),
            "trainable": list(start.trainable),
            "carried-dtype": start.carried_dtype,
            "local": json.dumps(start.local.to_dict()),
        }
    )
    return _content(job, payloads)


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
            VERSION_KEY: WIRE_VERSION,
            "server-round": server_round,
            "generate": generate,
            "rank-classes": list(payloads),
            "fingerprint": fingerprint,
            "origin": origin,
        }
    )
    return _content(job, payloads)


def _content(job: ConfigRecord, payloads: Mapping[str, Payload]) -> RecordDict:
    """The job and, where there are adapters, the bytes of all of them."""
    content = RecordDict({"job": job})
    if payloads:
        packed, index = pack_adapters({k: (p.arrays, p.values) for k, p in payloads.items()})
        job.update(index)
        if packed is not None:
            content[PACKED] = ArrayRecord({PACKED: Array(**vars(packed))})
    return content


def content_bytes(content: RecordDict) -> int:
    """Bytes of all arrays and factors in a message, as sent."""
    arrays = (array for record in content.array_records.values() for array in record.values())
    inline = (record.get(DATA) for record in content.config_records.values())
    return sum(len(array.data) for array in arrays) + sum(
        len(data) for data in inline if isinstance(data, bytes)
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
        return Capability.failed(f"node_{reply.metadata.src_node_id}", error_words(reply))
    try:
        record = reply.content["capability"]
        capability = Capability(**read_fields(Capability, record))
        check_capability(record, capability)
        return capability
    except Exception as error:  # whatever it is, the node sent it
        cause = f"unreadable capability report: {words_of(error)}"
        return Capability.failed(f"node_{reply.metadata.src_node_id}", cause)


def decode_train_result(reply: Message, start: Start | None = None) -> TrainResult:
    """A client's reply to a train message; factors that it did not train come from ``start``.

    Raises:
        UpdateRefused: an error reply or one that cannot be read, with its cause.
    """
    if reply.has_error():
        raise UpdateRefused(error_words(reply))
    try:
        report, records = reply.content["report"], reply.content.array_records
        values = read_fields(TrainResult, report)
        adapter = None
        if records or DATA in report:
            arrays = {name: array for record in records.values() for name, array in record.items()}
            unpacked = unpack_adapters(arrays, report, ["update"])
            adapter = decode_adapter(
                *unpacked["update"],
                labels=start.trainable if start is not None else FACTORS,
                held=start.trained if start is not None else None,
            )
        result = TrainResult(**values, adapter=adapter)
        measured = adapter is not None and not result.withheld
        if measured and not math.isfinite(result.train_loss):
            raise ValueError(f"train-loss is {result.train_loss}")
        return result
    except Exception as error:  # whatever it is, the node sent it
        raise UpdateRefused(f"unreadable reply: {words_of(error)}") from None


def decode_eval_result(reply: Message) -> EvalResult:
    """A client's reply to an evaluate message; an error becomes a result with a cause."""
    if reply.has_error():
        return EvalResult(client_id=f"node_{reply.metadata.src_node_id}", cause=error_words(reply))
    try:
        report = reply.content["report"]
        scores = scores_of(report)
        for name, score in scores.items():
            check_score(name, score)
        values = read_fields(EvalResult, {k: report[k] for k in ("client-id", "cause")})
        return EvalResult(**values, scores=scores)
    except Exception as error:  # whatever it is, the node sent it
        cause = f"unreadable scores: {words_of(error)}"
        return EvalResult(client_id=f"node_{reply.metadata.src_node_id}", cause=cause)


def scores_of(report: Mapping) -> dict[str, Score]:
    """The scores by rank class, from one list for each sum.

    The sums after ``generated`` are newer than the format: a node that does not send them has none.
    """
    names = report.get("scores", [])
    keys = [field.name.replace("_", "-") for field in fields(Score)]
    old = keys[: keys.index("generated") + 1]
    sent = [key for key in keys if key in old or f"score/{key}" in report]
    columns = {key: report.get(f"score/{key}", []) for key in sent}
    if len(set(names)) != len(names) or {len(c) for c in columns.values()} != {len(names)}:
        raise ValueError("the lists of scores and of rank classes have different lengths")
    return {
        name: Score(**read_fields(Score, {key: column[k] for key, column in columns.items()}))
        for k, name in enumerate(names)
    }


def error_words(reply: Message) -> str:
    words = printable(reply.error.reason or "no reason given", 1000)
    if reply.error.code == UNREADABLE and reply.error.reason:
        return words
    return f"Flower error {reply.error.code}: {words}"


def words_of(error: Exception) -> str:
    return printable(reason(error), 1000)
