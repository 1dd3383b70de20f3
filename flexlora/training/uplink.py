"""How trained factors leave their client: what rounding drops is put away for the next upload.

What lies between two rounds is a residual at a few times the rank of the factors
(``wire_feedback.py``), where the other own factors of a client lie (``personal_store.py``): that of
its last two rounds, so that a round which is repeated, after a crash or a lost reply, sends the
same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from flexlora.config.resolve import Config
from flexlora.errors import one_line
from flexlora.lora.adapters import Adapter
from flexlora.training.personal_store import Kept, PersonalStore
from flexlora.wire.encoding import FACTORS, over_the_wire
from flexlora.wire.feedback import compensated, feedback_space, lost
from flexlora.wire.jobs import TrainJob, TrainResult

__all__ = ["Uplink", "feedback_beside", "noted"]

WITHOUT = "int8 without error feedback"


@dataclass(frozen=True, kw_only=True)
class Uplink:
    """How trained factors leave their client; without a ``store`` nothing is kept of rounding."""

    dtype: str
    space: str = ""
    store: PersonalStore | None = None

    @classmethod
    def of(cls, config: Config, store: PersonalStore | None, *, dtype: str = "") -> Uplink:
        """That of a run, over the wire's own dtype unless another is given."""
        feedback = getattr(config.method, "error_feedback", False)
        space = feedback_space(config.method.name, error_feedback=feedback)
        return cls(dtype=dtype or config.wire.dtype, space=space, store=store)

    def ready(self, result: TrainResult, job: TrainJob) -> TrainResult:
        """The result with the factors that are to be encoded, and what that drops put away.

        What cannot be kept is not sent either: then the factors go as they are, and a note says so.
        NaN or infinity goes as it is too, for the server to refuse.
        """
        if self.dtype != "int8" or result.adapter is None or not _is_finite(result.adapter):
            return result
        if self.store is None or not self.space:
            return noted(result, f"{WITHOUT}: nothing is kept between rounds here")
        try:
            return self._with_feedback(result, result.adapter, job, self.store)
        except Exception as error:
            return noted(result, f"{WITHOUT}: {one_line(error)}")

    def _with_feedback(
        self, result: TrainResult, adapter: Adapter, job: TrainJob, store: PersonalStore
    ) -> TrainResult:
        start, adapter = job.start.for_client(job.client_id), adapter.to("cpu")
        kept = store.before(job.client_id, job.server_round)
        error = kept.adapter if kept is not None else None
        sent = compensated(adapter, error, self.space, start.trainable)
        decoded = over_the_wire(sent, self.dtype, start.trainable, start.trained)
        store.put(
            Kept(
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


def noted(result: TrainResult, note: str) -> TrainResult:
    """The result with one more thing that was different about it."""
    return replace(result, note="; ".join(part for part in (result.note, note) if part))


def feedback_beside(personal: PersonalStore) -> PersonalStore:
    """Where that lies which rounding took, beside what else a client keeps to itself."""
    return personal.beside("feedback", what="factors kept for the next upload")
