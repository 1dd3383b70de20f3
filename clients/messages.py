"""Decode and encode the content of Flower messages on the client's side; nothing is pickled.

A content is a ``RecordDict``: the caller takes it from a Flower message or from a resident
trainer's request, and puts the reply into one.

    train      decode_train_job       encode_train_result
    evaluate   decode_evaluate_job    encode_evaluate_result
    query                             encode_capability
"""

from __future__ import annotations

import json
from collections.abc import Mapping, MutableMapping
from dataclasses import asdict

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from flexlora.aggregation.engine.starts import LocalPlan, Start
from flexlora.lora.adapters import Adapter
from flexlora.lora.ranks import RankClass
from flexlora.wire.encoding import FACTORS, decode_adapter, encode_adapter
from flexlora.wire.jobs import Capability, EvalJob, EvalResult, TrainJob, TrainResult

__all__ = [
    "decode_evaluate_job",
    "decode_train_job",
    "encode_capability",
    "encode_evaluate_result",
    "encode_train_result",
]

Memo = MutableMapping[int, Adapter]  # id of a record shared by several messages -> its adapter
LOCAL_FIELDS = ("adapter", "personal", "too_many")  # of a TrainResult: not part of the report


def decode_train_job(content: Mapping, client_id: str, memo: Memo | None = None) -> TrainJob:
    """The job in a train message. With ``memo`` a record is decoded once for all its messages.

    Raises:
        UpdateRefused: arrays that do not match their names, shapes or dtypes.
    """
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
    content = RecordDict({"report": _config_record(values)})
    if result.adapter is not None:
        labels = start.trainable if start is not None else FACTORS
        held = start.trained if start is not None else None
        arrays, more = encode_adapter(result.adapter, dtype, labels, held)
        content["update"] = ArrayRecord({k: Array(**vars(array)) for k, array in arrays.items()})
        content["update.values"] = ConfigRecord({**more})
    return content


def decode_evaluate_job(content: Mapping, client_id: str, memo: Memo | None = None) -> EvalJob:
    """The job in an evaluate message: one adapter per rank class, none for the bare base."""
    job = content["job"]
    return EvalJob(
        client_id=client_id,
        server_round=job["server-round"],
        adapters={name: _adapter(content, f"adapter/{name}", memo) for name in job["rank-classes"]},
        generate=job["generate"],
    )


def encode_evaluate_result(result: EvalResult) -> RecordDict:
    """One record of sums per rank class, and a report with the cause of what is missing."""
    report = {"client_id": result.client_id, "cause": result.cause}
    content = RecordDict({"report": _config_record(report)})
    for name, score in result.scores.items():
        content[f"score/{name}"] = ConfigRecord(asdict(score))
    return content


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


def _adapter(content: Mapping, name: str, memo: Memo | None) -> Adapter:
    record, values = content[name], content[f"{name}.values"]
    if memo is None:
        return decode_adapter(record, values)
    if id(record) not in memo:
        memo[id(record)] = decode_adapter(record, values)
    return memo[id(record)]
