"""Decode and encode the content of Flower messages on the client's side; nothing is pickled.

A content is a ``RecordDict``: the caller takes it from a Flower message or from a resident
trainer's request, and puts the reply into one.

    train      decode_train_job       encode_train_result
    evaluate   decode_evaluate_job    encode_evaluate_result
    query                             encode_capability
"""

from __future__ import annotations

import json
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import fields

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from flexlora.aggregation.engine.starts import LocalPlan, Start
from flexlora.lora.adapters import Adapter
from flexlora.lora.ranks import RankClass
from flexlora.wire.encoding import FACTORS, decode_adapter, encode_adapter
from flexlora.wire.jobs import Capability, EvalJob, EvalResult, Score, TrainJob, TrainResult
from flexlora.wire.packing import PACKED, check_version, pack_adapters, unpack_adapters

__all__ = [
    "Memo",
    "decode_evaluate_job",
    "decode_train_job",
    "encode_capability",
    "encode_evaluate_result",
    "encode_train_result",
]

# id of a record shared by several messages -> its adapters
Memo = MutableMapping[int, Mapping[str, Adapter]]
LOCAL_FIELDS = ("adapter", "personal", "too_many")  # of a TrainResult: not part of the report


def decode_train_job(content: Mapping, client_id: str, memo: Memo | None = None) -> TrainJob:
    """The job in a train message. With ``memo`` a record is decoded once for all its messages.

    Raises:
        UpdateRefused: arrays that do not match their names, shapes or dtypes.
        UserError: a server whose messages have another format.
    """
    job = content["job"]
    check_version(job)
    adapters = _adapters(content, job[f"{PACKED}/adapters"], memo)
    start = Start(
        rank_class=RankClass.from_dict(json.loads(job["rank-class"])),
        base_round=job["base-round"],
        trained=adapters["trained"],
        carried=adapters.get("carried"),
        carried_dtype=job["carried-dtype"],
        trainable=tuple(job["trainable"]),
        local=LocalPlan(**json.loads(job["local"])),
    )
    return TrainJob(
        client_id=client_id,
        server_round=job["server-round"],
        num_server_rounds=job["num-server-rounds"],
        skipped_rounds=int(job.get("skipped-rounds", 0)),
        start=start.sealed(),
    )


def encode_train_result(
    result: TrainResult, *, dtype: str, start: Start | None = None
) -> RecordDict:
    """The trained factors and a report, or a report with the cause of failure.

    Args:
        dtype: the wire's (``wire.dtype``).
        start: what this client started from. Factors that it did not train are left out, and int8
            may send the others as changes of it.
    """
    values = {key: value for key, value in vars(result).items() if key not in LOCAL_FIELDS}
    report = _config_record(values)
    content = RecordDict({"report": report})
    if result.adapter is not None:
        labels = start.trainable if start is not None else FACTORS
        held = start.trained if start is not None else None
        encoded = encode_adapter(result.adapter, dtype, labels, held)
        packed, index = pack_adapters({"update": encoded})
        report.update(index)
        if packed is not None:
            content[PACKED] = ArrayRecord({PACKED: Array(**vars(packed))})
    return content


def decode_evaluate_job(content: Mapping, client_id: str, memo: Memo | None = None) -> EvalJob:
    """The job in an evaluate message: one adapter per rank class, none for the bare base.

    Raises:
        UpdateRefused, UserError: as ``decode_train_job``.
    """
    job = content["job"]
    check_version(job)
    return EvalJob(
        client_id=client_id,
        server_round=job["server-round"],
        adapters=_adapters(content, job["rank-classes"], memo),
        generate=job["generate"],
    )


def encode_evaluate_result(result: EvalResult) -> RecordDict:
    """A report with the cause of what is missing, and a list of every sum over rank classes."""
    scores = result.scores
    values: dict[str, object] = {"client_id": result.client_id, "cause": result.cause}
    values["scores"] = list(scores)
    for field in fields(Score):
        kind = float if field.type == "float" else int  # a list holds one type
        values[f"score/{field.name}"] = [kind(getattr(s, field.name)) for s in scores.values()]
    return RecordDict({"report": _config_record(values)})


def encode_capability(capability: Capability) -> RecordDict:
    """The reply to a query: the client's data, base, device and kernels."""
    return RecordDict({"capability": _config_record(vars(capability))})


def _config_record(values: Mapping) -> ConfigRecord:
    """Fields as Flower takes them: kebab-case keys, lists for tuples."""
    return ConfigRecord(
        {
            key.replace("_", "-"): list(value) if isinstance(value, tuple) else value
            for key, value in values.items()
        }
    )


def _adapters(content: Mapping, names: Sequence[str], memo: Memo | None) -> Mapping[str, Adapter]:
    """The adapters of a message, which must have these names."""
    if not names:
        return {}
    job = content["job"]
    if memo is not None and id(job) in memo:
        return memo[id(job)]
    unpacked = unpack_adapters(content.get(PACKED, {}), job, names)
    adapters = {name: decode_adapter(*encoded) for name, encoded in unpacked.items()}
    if memo is not None:
        memo[id(job)] = adapters
    return adapters
