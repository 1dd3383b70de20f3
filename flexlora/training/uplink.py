"""Prepares factors for the upload; int8 rounding errors are added to the next upload.

The error of an upload has a few times the rank of the factors (``wire/feedback.py``). It is stored
for the last rounds of each client, so that a round repeated after a crash or a lost reply sends the
same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from flexlora.config.resolve import Config
from flexlora.errors import one_line
from flexlora.lora.adapters import Adapter
from flexlora.training.personal_store import PersonalStore, StoredFactors
from flexlora.wire.encoding import FACTORS, over_the_wire
from flexlora.wire.feedback import compensated, feedback_space, lost
from flexlora.wire.jobs import TrainJob, TrainResult

__all__ = ["Uplink", "add_note", "feedback_store"]

WITHOUT = "int8 without error feedback"


@dataclass(frozen=True, kw_only=True)
class Uplink:
    """The dtype and error feedback of uploads; without a ``store`` rounding errors are dropped."""

    dtype: str
    space: str = ""
    store: PersonalStore | None = None

    @classmethod
    def of(cls, config: Config, store: PersonalStore | None, *, dtype: str = "") -> Uplink:
        """The uplink of a run, in ``wire.dtype`` unless ``dtype`` is given."""
        feedback = getattr(config.method, "error_feedback", False)
        space = feedback_space(config.method.name, error_feedback=feedback)
        return cls(dtype=dtype or config.wire.dtype, space=space, store=store)

    def ready(self, result: TrainResult, job: TrainJob) -> TrainResult:
        """The result with the factors to encode: error added in, and the new error stored.

        Where the error cannot be stored, the factors are sent unchanged with a note. NaN and
        infinity are sent unchanged too, for the server to refuse.
        """
        if self.dtype != "int8" or result.adapter is None or not _is_finite(result.adapter):
            return result
        if self.store is None or not self.space:
            return add_note(result, f"{WITHOUT}: nothing is kept between rounds here")
        try:
            return self._with_feedback(result, result.adapter, job, self.store)
        except Exception as error:
            return add_note(result, f"{WITHOUT}: {one_line(error)}")

    def _with_feedback(
        self, result: TrainResult, adapter: Adapter, job: TrainJob, store: PersonalStore
    ) -> TrainResult:
        start, adapter = job.start.for_client(job.client_id), adapter.to("cpu")
        stored = store.before(job.client_id, job.server_round)
        error = stored.adapter if stored is not None else None
        sent = compensated(adapter, error, self.space, start.trainable)
        decoded = over_the_wire(sent, self.dtype, start.trainable, start.trained)
        store.put(
            StoredFactors(
                client_id=job.client_id,
                server_round=job.server_round,
                rank_class=start.rank_class.name,
                adapter=lost(adapter, error, decoded, self.space, start.trainable),
            )
        )
        return replace(result, adapter=sent)


def _is_finite(adapter: Adapter) -> bool:
    return all(
        bool(torch.isfinite(getattr(factors, label)).all())
        for factors in adapter.values()
        for label in FACTORS
    )


def add_note(result: TrainResult, note: str) -> TrainResult:
    """The result with ``note`` appended to its notes."""
    return replace(result, note="; ".join(part for part in (result.note, note) if part))


def feedback_store(personal: PersonalStore) -> PersonalStore:
    """The store of rounding errors, in a folder inside that of the personal factors."""
    folder = personal.folder and personal.folder / "feedback"
    return PersonalStore(
        folder, what="factors kept for the next upload", rounds_kept=personal.rounds_kept
    )
