"""Which evaluations go through together: those with the same adapters, and cohorts of own ones.

    shared    every adapter is a slot, all over the same rows: K times the rows in a pass
    own       every client is a slot over its own rows: K times the most rows of any in a pass

A plan depends on the jobs and their rows, never on the order in which they come.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from flexlora.data.collation import Example
from flexlora.lora.adapters import Adapter
from flexlora.wire.jobs import PERSONAL, EvalJob

__all__ = ["Asked", "below_of"]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is to be evaluated, ``examples[k]`` under the adapters of ``jobs[k]``."""

    jobs: Sequence[EvalJob]
    examples: Sequence[Sequence[Example]]
    _digests: dict[int, str] = field(default_factory=dict)

    def _digest(self, adapter: Adapter) -> str:
        """Equal for equal adapters; an object that many jobs share is read once."""
        if id(adapter) not in self._digests:
            self._digests[id(adapter)] = adapter.digest()
        return self._digests[id(adapter)]

    def groups(self) -> Iterable[list[int]]:
        """Jobs with rows that have the same adapters and the same questions."""
        groups: dict[tuple, list[int]] = {}
        for k in sorted(range(len(self.jobs)), key=lambda k: (self.jobs[k].client_id, k)):
            job = self.jobs[k]
            digests = tuple((name, self._digest(a)) for name, a in job.adapters.items())
            if self.examples[k]:
                groups.setdefault((job.generate, digests), []).append(k)
        return groups.values()

    def cohorts(self, batch_size: int) -> list[list[int]]:
        """Jobs with an adapter of their own that go through together, one slot each.

        K jobs make a pass of K times their most rows, at most ``batch_size``, and at least half of
        its tokens are real: clients with about as many rows of alike length come together. A job
        with more rows than that is alone. What lies below is shared in memory, so that jobs over
        different adapters are never in one cohort.
        """
        cohorts: list[list[int]] = []
        kind: tuple = ()
        for k in sorted(self._own(), key=self._place):
            job_kind = self._place(k)[:2]
            if job_kind == kind and self._fit([*cohorts[-1], k], batch_size):
                cohorts[-1].append(k)
            else:
                cohorts.append([k])
            kind = job_kind
        return cohorts

    def _own(self) -> list[int]:
        own = [k for k, job in enumerate(self.jobs) if job.personal is not None]
        return [k for k in own if self.examples[k]]

    def _place(self, k: int) -> tuple:
        job, lengths = self.jobs[k], [len(row.input_ids) for row in self.examples[k]]
        below = below_of(job)
        kind = (job.generate, "" if below is None else self._digest(below))
        return (*kind, len(lengths), max(lengths), job.client_id, k)

    def _fit(self, members: Sequence[int], batch_size: int) -> bool:
        lengths = [[len(row.input_ids) for row in self.examples[k]] for k in members]
        rows = len(members) * max(len(own) for own in lengths)
        padded = rows * max(max(own) for own in lengths)
        return rows <= batch_size and 2 * sum(sum(own) for own in lengths) >= padded


def below_of(job: EvalJob) -> Adapter | None:
    """What a job's own factors lie over.

    Raises:
        ValueError: it is not among the job's adapters, or its scores could not be told from theirs.
    """
    who = f"client {job.client_id}: personal factors"
    if PERSONAL in job.adapters:
        raise ValueError(f"{who} and a rank class are both named '{PERSONAL}'; rename the class.")
    if not job.personal_over:
        return None
    if job.personal_over not in job.adapters:
        known = ", ".join(job.adapters) or "none"
        raise ValueError(f"{who} lie over '{job.personal_over}', expected one of {known}.")
    return job.adapters[job.personal_over]
