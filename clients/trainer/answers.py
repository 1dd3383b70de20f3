"""A content in, a content out: what a worker answers to the content of a message.

The resident trainer and a ClientApp that trains in its own process call the same ``answer``; a
failure becomes a reply that says why.
"""

from __future__ import annotations

from dataclasses import replace

from flwr.app import MessageType, RecordDict

from flexlora.clients.messages import (
    capability_reply,
    evaluate_reply,
    read_evaluate,
    read_train,
    train_reply,
)
from flexlora.clients.trainer.failures import failure
from flexlora.clients.worker import Worker, failed_training
from flexlora.errors import UserError, one_line
from flexlora.training.personal_store import PersonalStore
from flexlora.training.uplink import Uplink, noted
from flexlora.wire.jobs import TrainJob, TrainResult

__all__ = ["answer", "cause_of"]


def answer(
    message_type: str,
    content: RecordDict,
    worker: Worker,
    client_id: str,
    *,
    personal: PersonalStore | None = None,
    feedback: PersonalStore | None = None,
    free_bytes: int | None = None,
    drop: bool = False,
) -> RecordDict:
    """The reply of ``client_id`` to a content.

    Args:
        personal: where the factors lie that this client keeps to itself; None keeps none.
        feedback: where that lies which rounding took from its uploads; None keeps none.
        free_bytes: what is said to be free, where the worker was made with the base in memory.
        drop: empty ``content`` once it is decoded, so that the arrays' bytes do not stay in memory
            beside the factors while they are trained.
    """
    try:
        if message_type == MessageType.QUERY:
            capability = worker.capability(client_id)
            if free_bytes is not None:
                capability = replace(capability, free_bytes=free_bytes)
            return capability_reply(capability)
        _check_base(content, worker)
        if message_type == MessageType.TRAIN:
            job = read_train(content, client_id)
            if drop:
                content.clear()
            return _trained(job, worker, personal, feedback)
        jobs = [read_evaluate(content, client_id)]
        if drop:
            content.clear()
        jobs = personal.attach_eval(jobs) if personal else jobs
        return evaluate_reply(worker.evaluate(jobs)[0])
    except Exception as error:
        return failure(message_type, client_id, one_line(error))


def _check_base(content: RecordDict, worker: Worker) -> None:
    """Refuse factors that were made for another base, where the job says which it was."""
    wanted = str(content.config_records["job"].get("fingerprint", ""))
    held = worker.base.fingerprint
    if wanted and wanted != held:
        raise UserError(
            f"the job is for the base {wanted}, this node holds {held} "
            f"({worker.base.name}); use the run's base."
        )


def _trained(
    job: TrainJob, worker: Worker, personal: PersonalStore | None, feedback: PersonalStore | None
) -> RecordDict:
    """The reply to a train job; what a client keeps to itself must not cost it its update."""
    attached, trouble = _attached(job, personal)
    try:
        result = worker.train([attached])[0]
    except Exception as error:
        result = failed_training(job, one_line(error))
    if personal is not None and not trouble:
        trouble = _not_kept(result, job, personal)
    if trouble:
        result = noted(result, f"personal factors: {trouble}")
    config, start = worker.config, job.start.for_client(job.client_id)
    result = Uplink.of(config, feedback).ready(result, job)
    return train_reply(result, dtype=config.wire.dtype, start=start)


def _attached(job: TrainJob, personal: PersonalStore | None) -> tuple[TrainJob, str]:
    """The job with what its client kept to itself, or why it has to do without."""
    try:
        return (personal.attach([job])[0] if personal is not None else job), ""
    except Exception as error:
        return job, one_line(error)


def _not_kept(result: TrainResult, job: TrainJob, personal: PersonalStore) -> str:
    """Why what was trained for the client itself could not be put away; "" where it was."""
    try:
        personal.keep([result], [job])
    except Exception as error:
        return f"not kept: {one_line(error)}"
    return ""


def cause_of(content: RecordDict) -> str:
    """Why a reply holds nothing, "" where it holds what was asked for."""
    record = content.config_records.get("report") or content.config_records.get("capability")
    return str(record["cause"]) if record else "an empty reply"
