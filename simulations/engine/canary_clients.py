"""Canary clients in the engine: nodes beside those of the data, which answer without training.

A canary registers and is sampled like any client. When it is asked to train, one that is in sends
its change through the wire, and one that is out fails. So nothing but the sum depends on the coins:
not who is registered, not who is sampled. It has no held-out rows, and its evaluation no scores.

Coins and directions come from a secret of the run, which the operating system gives, or from the
run's seed with ``privacy.reproducible=true``: a seed that everybody uses is no coin.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median_low

from flexlora.clients.worker import Worker, failed_training
from flexlora.config.resolve import Config
from flexlora.errors import UserError
from flexlora.privacy.canaries import Canaries
from flexlora.runs.canary_file import CANARY_FILE, CanaryRecord
from flexlora.seeds import derive_seed
from flexlora.wire.jobs import Capability, EvalJob, EvalResult, TrainJob, TrainResult

__all__ = ["OUT", "CanaryClients", "canary_record"]

SECRET_BITS = 62
OUT = "a canary whose coin fell on out sends nothing"


def canary_record(config: Config, worker: Worker, out: Path, *, go_on: bool) -> CanaryRecord | None:
    """The canaries that ``audit.canaries`` asks for; those of the run in ``out`` with ``go_on``.

    Raises:
        UserError: the record of a run that is to go on is gone or damaged, or a client of the data
            has a canary's name.
    """
    if not config.audit.canaries:
        return None
    if go_on:
        record = CanaryRecord.read(out)
        if record is None:
            raise UserError(
                f"'{out / CANARY_FILE}' is gone, and with it the coins of the run's canaries; "
                "without them it cannot be resumed."
            )
        return record
    secret = secrets.randbits(SECRET_BITS)
    if config.privacy.reproducible:
        secret = derive_seed(config.seed, "canaries")
    counts = [worker.data.count(client_id, "train").examples for client_id in worker.client_ids]
    canaries = Canaries(
        secret=secret,
        count=config.audit.canaries,
        norm=config.audit.canary_norm or config.privacy.clip,
        num_examples=max(1, median_low(counts)),
    )
    if taken := set(canaries.client_ids) & set(worker.client_ids):
        raise UserError(
            f"client '{min(taken)}' of the data has the name of a canary; rename it, or leave "
            "audit.canaries out."
        )
    return CanaryRecord(canaries=canaries, share=config.fraction_train)


@dataclass(frozen=True, kw_only=True)
class CanaryClients:
    """What the canaries answer; ``like`` is the report of a client of the data."""

    canaries: Canaries
    like: Capability

    def __contains__(self, client_id: object) -> bool:
        return client_id in self.canaries.client_ids

    def capability(self, client_id: str) -> Capability:
        examples = self.canaries.num_examples
        return replace(self.like, client_id=client_id, num_examples=examples, num_dropped=0)

    def evaluate(self, job: EvalJob) -> list[EvalResult]:
        """A cohort of one without scores: a canary has no rows."""
        return [EvalResult(client_id=job.client_id)]

    def train(self, job: TrainJob) -> list[TrainResult]:
        """A cohort of one: the canary's change of what it was sent, or a failure."""
        if not self.canaries.included(job.client_id):
            return [failed_training(job, OUT)]
        result = TrainResult(
            client_id=job.client_id,
            rank_class=job.start.rank_class.name,
            base_round=job.start.base_round,
            digest=job.start.digest,
            num_examples=self.canaries.num_examples,
            adapter=self.canaries.update(job.client_id, job.start.trained),
            # The server takes finite losses only, and none of a result without steps.
            train_loss=0.0,
            loss_before=0.0,
            loss_after=0.0,
        )
        return [result]
