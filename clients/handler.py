"""Answer the content of a message with a worker: a RecordDict in, a RecordDict out.

``answer`` serves the resident trainer and, through ``answer_here``, a ClientApp without one, whose
own process loads the base. A failure becomes a reply with its cause.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from flwr.app import Context, Message, MessageType, RecordDict

from flexlora.clients.failure_reply import is_transient, reply_of
from flexlora.clients.messages import (
    decode_evaluate_job,
    decode_train_job,
    encode_capability,
    encode_evaluate_result,
    encode_train_result,
)
from flexlora.clients.trainer.owner_config import ONE_CLIENT, of_run
from flexlora.clients.worker import Worker, failed_training, worker_for
from flexlora.config.resolve import Config
from flexlora.errors import UserError, one_line
from flexlora.privacy.client_rounds import CLIENT_MODES
from flexlora.privacy.local_checks import check_client_privacy
from flexlora.privacy.local_noise import privatized
from flexlora.training.personal_store import PersonalStore
from flexlora.training.uplink import Uplink, add_note
from flexlora.wire.jobs import EvalJob, TrainJob

__all__ = ["answer", "answer_here", "worker_of"]


def answer_here(message: Message, context: Context) -> RecordDict:
    """The reply of a node without a resident trainer.

    Raises:
        UserError: a node config that names no client, a base or data that cannot be loaded.
    """
    worker, client_id = worker_of(context)
    privacy = worker.config.privacy
    if privacy.mode in CLIENT_MODES and privacy.epsilon:
        raise UserError(
            f"privacy.epsilon is {privacy.epsilon:g} with privacy.mode={privacy.mode}, and this "
            "node has no resident trainer, which would know what is spent; start one with "
            "`flexlora client serve`, or leave the budget out."
        )
    return answer(message.metadata.message_type, message.content, worker, client_id)


def worker_of(context: Context) -> tuple[Worker, str]:
    """The worker and the client id of a node.

    In simulation ``partition-id`` selects the client. A node whose node config has ``data-path``
    is one client with all rows there, named by ``client-id``; ``model-path`` and ``quantization``
    replace the run's.
    """
    values, node = of_run(context.run_config), context.node_config
    if "model-path" in node:
        values["model.name"] = str(node["model-path"])
    if "quantization" in node:
        values |= {"model.quantization": str(node["quantization"]), "clients.quantization": ""}
    if "data-path" in node:
        name = str(node.get("client-id", f"node_{context.node_id}"))
        values |= {"data.path": str(node["data-path"]), **ONE_CLIENT}
        worker = worker_for(Config.of(values))
        worker.data.rename(name)
        return worker, name
    if "partition-id" not in node:
        raise UserError(
            "the node has neither data-path nor partition-id in its node config; "
            'start it with --node-config \'data-path="..." client-id="..."\'.'
        )
    worker = worker_for(Config.of(values))
    partition = int(node["partition-id"])
    client_id = worker.client_at(partition)
    if client_id is None:
        known = len(worker.client_ids)
        raise UserError(f"partition {partition} has no client: the data makes {known} clients.")
    return worker, client_id


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
    check: Callable[[TrainJob | EvalJob], None] = lambda job: None,
) -> RecordDict:
    """The reply of ``client_id`` to a content.

    Args:
        personal: the store of the client's personal factors; None stores none.
        feedback: the store of the rounding errors of its uploads; None stores none.
        free_bytes: reported as free memory in place of the worker's, which may have been made
            when the base was loaded already.
        drop: empty ``content`` once it is decoded, so that the arrays' bytes are freed before
            training.
        check: raises where the decoded job is not to be done.
    """
    try:
        if message_type == MessageType.QUERY:
            capability = worker.capability(client_id)
            if free_bytes is not None:
                capability = replace(capability, free_bytes=free_bytes)
            return encode_capability(capability)
        _check_base(content, worker)
        if message_type == MessageType.TRAIN:
            check_client_privacy(worker.config)
            job = decode_train_job(content, client_id)
            check(job)
            if drop:
                content.clear()
            return _train(job, worker, personal, feedback)
        jobs = [decode_evaluate_job(content, client_id)]
        check(jobs[0])
        if drop:
            content.clear()
        jobs = personal.attach_eval(jobs) if personal else jobs
        return encode_evaluate_result(worker.evaluate(jobs)[0])
    except Exception as error:
        return reply_of(message_type, client_id, error)


def _check_base(content: RecordDict, worker: Worker) -> None:
    """Refuse a job whose base has another fingerprint; a job may name none."""
    wanted = str(content.config_records["job"].get("fingerprint", ""))
    held = worker.base.fingerprint
    if wanted and wanted != held:
        raise UserError(
            f"the job is for the base {wanted}, this node holds {held} "
            f"({worker.base.name}); use the run's base."
        )


def _train(
    job: TrainJob, worker: Worker, personal: PersonalStore | None, feedback: PersonalStore | None
) -> RecordDict:
    """The reply to a train job. Trouble with personal factors is noted and costs no update."""
    attached, trouble = job, ""
    try:
        if personal is not None:
            (attached,) = personal.attach([job])
    except Exception as error:
        trouble = one_line(error)
    try:
        (result,) = worker.train([attached])
    except Exception as error:
        result = replace(failed_training(job, one_line(error)), transient=is_transient(error))
    try:
        if personal is not None and not trouble:
            personal.keep([result], [job])
    except Exception as error:
        trouble = f"not kept: {one_line(error)}"
    if trouble:
        result = add_note(result, f"personal factors: {trouble}")
    config, start = worker.config, job.start.for_client(job.client_id)
    result = Uplink.of(config, feedback).ready(privatized(result, job, config), job)
    return encode_train_result(result, dtype=config.wire.dtype, start=start)
