"""Which evaluation jobs share forward passes.

    shared adapters    one slot per adapter, all on the same rows: a pass has K times the rows
    personal adapters  one slot per client, each on its rows: a pass has K times the most rows

A plan depends on the jobs and their rows, not on the order of arrival.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flexlora.data.collation import Example
from flexlora.lora.adapters import Adapter
from flexlora.wire.jobs import PERSONAL, EvalJob

__all__ = ["EvalPlan", "carried_adapter"]


@dataclass(frozen=True, kw_only=True)
class EvalPlan:
    """Groups of ``jobs``; ``examples[k]`` are the rows of ``jobs[k]``."""

    jobs: Sequence[EvalJob]
    examples: Sequence[Sequence[Example]]

    def groups(self) -> Iterable[list[int]]:
        """Indices of jobs with rows, grouped by equal adapters and equal ``generate``."""
        groups: dict[tuple, list[int]] = {}
        for k in sorted(range(len(self.jobs)), key=lambda k: (self.jobs[k].client_id, k)):
            job = self.jobs[k]
            digests = tuple((name, a.digest()) for name, a in job.adapters.items())
            if self.examples[k]:
                groups.setdefault((job.generate, digests), []).append(k)
        return groups.values()

    def cohorts(self, batch_size: int) -> list[list[int]]:
        """Indices of jobs with personal factors that share passes, one slot each.

        K jobs make a pass of K times their most rows: at most ``batch_size`` rows with at most half
        of the tokens padding, so clients with similar row counts and lengths share a cohort. A job
        with more rows is alone. All jobs of a cohort carry the same adapter, stored once.
        """
        cohorts: list[list[int]] = []
        previous: tuple = ()
        for k in sorted(self._personal(), key=self._sort_key):
            kind = self._sort_key(k)[:2]
            if kind == previous and self._fit([*cohorts[-1], k], batch_size):
                cohorts[-1].append(k)
            else:
                cohorts.append([k])
            previous = kind
        return cohorts

    def _personal(self) -> list[int]:
        jobs = enumerate(self.jobs)
        return [k for k, job in jobs if job.personal is not None and self.examples[k]]

    def _sort_key(self, k: int) -> tuple:
        job, lengths = self.jobs[k], [len(row.input_ids) for row in self.examples[k]]
        carried = carried_adapter(job)
        kind = (job.generate, "" if carried is None else carried.digest())
        return (*kind, len(lengths), max(lengths), job.client_id, k)

    def _fit(self, members: Sequence[int], batch_size: int) -> bool:
        lengths = [[len(row.input_ids) for row in self.examples[k]] for k in members]
        rows = len(members) * max(map(len, lengths))
        padded = rows * max(map(max, lengths))
        return rows <= batch_size and 2 * sum(map(sum, lengths)) >= padded


def carried_adapter(job: EvalJob) -> Adapter | None:
    """The adapter of the job that its personal factors are added to; None for the bare base.

    Raises:
        ValueError: the job has no such adapter, or a rank class with the name of personal scores.
    """
    who = f"client {job.client_id}: personal factors"
    if PERSONAL in job.adapters:
        raise ValueError(f"{who} and a rank class are both named '{PERSONAL}'; rename the class.")
    if not job.personal_over:
        return None
    if job.personal_over not in job.adapters:
        known = ", ".join(job.adapters) or "none"
        raise ValueError(f"{who} are over '{job.personal_over}', expected one of {known}.")
    return job.adapters[job.personal_over]
