"""Which clients of a round go through the model together.

A cohort's pass is as wide as its longest row and as deep as its highest rank, so clients of alike
length and rank are packed together, up to a number of clients and of padded tokens. Both limits
come from a cost model, from ``flexlora tune`` or from the configuration, and are in the resolved
configuration: the plan is a function of the round's clients, never of arrival or timing.

The cost model. On a CPU a pass of a few thousand tokens is as fast per token as any wider one, and
its activations stay near the caches. A GPU is filled: as many clients' rows as its memory holds
beside the base, their factors, gradients and optimizers among them (``cohort_memory.py``).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from flexlora.clients.worker import Worker
from flexlora.config.resolve import Config
from flexlora.data.collation import Example
from flexlora.errors import UserError
from flexlora.simulations.engine.cohort_memory import CohortMemory
from flexlora.wire.jobs import TrainJob

__all__ = ["CohortLimits", "limits_of", "longest_row", "plan_cohorts", "resolved_limits"]

CPU_TOKENS = 4096
CUDA_TOKENS = 1 << 16  # beyond it nothing is gained, and a lost cohort costs more
MOST_CLIENTS = 64
LENGTH_STEP = 32  # rows within so many tokens of each other are alike
KEPT_FREE = {"cpu": 0.5, "cuda": 0.2}  # of the free memory; other programs use the CPU's too


@dataclass(frozen=True, kw_only=True)
class CohortLimits:
    """At most ``clients`` in a pass, and at most ``tokens`` unless one client has more.

    ``failed`` are clients and tokens of passes that ran out of memory: a cohort that has as many of
    both is not planned again.
    """

    clients: int
    tokens: int = 1 << 62
    failed: tuple[tuple[int, int], ...] = ()

    def fits(self, clients: int, tokens: int) -> bool:
        """Whether a pass of so many is within the limits, and smaller than any that failed."""
        too_large = any(clients >= most and tokens >= width for most, width in self.failed)
        return clients <= self.clients and tokens <= self.tokens and not too_large

    def without(self, clients: int, tokens: int) -> CohortLimits:
        """These limits after a pass of so many clients and tokens ran out of memory."""
        if not self.fits(clients, tokens):
            return self
        kept = [(c, t) for c, t in self.failed if c < clients or t < tokens]
        return replace(self, failed=tuple(sorted([*kept, (clients, tokens)])))


def plan_cohorts(
    jobs: Mapping[str, TrainJob],
    limits: CohortLimits,
    *,
    rows: Callable[[str], Sequence[Example]],
    batch_size: int,
    pass_key: Callable[[str], str] = lambda _: "",
) -> list[list[str]]:
    """Keys of ``jobs`` in cohorts; clients with another ``pass_key`` (another base) apart.

    ``rows`` gives a client's train rows; ``batch_size`` of them are in a pass.
    """
    widths = {key: longest_row(rows(job.client_id)) for key, job in jobs.items()}

    def alike(key: str) -> tuple:
        job = jobs[key]
        plan = (job.start.trainable, repr(job.start.local), job.start.carried_dtype)
        return pass_key(job.client_id), plan

    def order(key: str) -> tuple:
        steps = -(-widths[key] // LENGTH_STEP)
        return (*alike(key), steps, jobs[key].start.rank_class.largest, jobs[key].client_id)

    def fits(keys: Sequence[str]) -> bool:
        return limits.fits(len(keys), len(keys) * batch_size * max(widths[key] for key in keys))

    cohorts: list[list[str]] = []
    for key in sorted(jobs, key=order):
        last = cohorts[-1] if cohorts else []
        if last and fits([*last, key]) and alike(last[0]) == alike(key):
            last.append(key)
        else:
            cohorts.append([key])
    even: list[list[str]] = []
    for _, group in groupby(cohorts, key=lambda cohort: alike(cohort[0])):
        parts = list(group)
        evened = _evened(parts)
        # Where tokens set the sizes they would not hold for others, and the widest rows may have
        # had a small cohort to themselves.
        alike_sizes = len({len(part) for part in parts[:-1]}) <= 1
        holds = all(len(part) == 1 or fits(part) for part in evened)
        even += evened if alike_sizes and holds else parts
    return even


def _evened(parts: Sequence[Sequence[str]]) -> list[list[str]]:
    """As many cohorts of the same clients, of nearly equal sizes: workers end at the same time."""
    keys = [key for part in parts for key in part]
    evened, at = [], 0
    for k in range(len(parts)):
        size = len(keys) // len(parts) + (k < len(keys) % len(parts))
        evened.append(keys[at : at + size])
        at += size
    return evened


def longest_row(rows: Sequence[Example]) -> int:
    """Tokens of the longest row, 1 without rows."""
    return max((len(example.input_ids) for example in rows), default=1)


def limits_of(config: Config) -> CohortLimits:
    """The limits of a configuration in which they have been resolved."""
    return CohortLimits(clients=config.engine.cohort_size, tokens=config.engine.cohort_tokens)


def resolved_limits(config: Config, worker: Worker) -> Config:
    """The configuration with the cost model's limits in the place of zeros."""
    asked = config.engine.cohort_size, config.engine.cohort_tokens
    try:
        room = _Room.of(config, worker)
    except UserError:  # another architecture, or targets by an expression
        room = None
    tokens = asked[1] or _tokens(config, worker, room)
    # A number of clients that is set alone wins over the token limit.
    if asked[0] and not asked[1]:
        tokens = max(tokens, asked[0] * _largest_pass(config))
    clients = MOST_CLIENTS if room is None else room.clients(tokens)
    return config.with_values(
        {"engine.cohort-size": asked[0] or clients, "engine.cohort-tokens": tokens}
    )


def _largest_pass(config: Config) -> int:
    return config.train.per_device_train_batch_size * config.train.max_length


def _tokens(config: Config, worker: Worker, room: _Room | None) -> int:
    wanted = CPU_TOKENS if worker.base.device.type == "cpu" else CUDA_TOKENS
    if room is None:
        return min(wanted, 8 * _largest_pass(config))
    return max(config.train.max_length, room.tokens(wanted))


@dataclass(frozen=True, kw_only=True)
class _Room:
    """``free_bytes`` of a device, which bases and the largest pass are to fit into."""

    memory: CohortMemory
    free_bytes: float

    @staticmethod
    def of(config: Config, worker: Worker) -> _Room:
        kind = worker.base.device.type
        memory = CohortMemory.of(config, unified=kind == "cpu")
        return _Room(memory=memory, free_bytes=(1.0 - KEPT_FREE[kind]) * worker.free_bytes)

    def tokens(self, wanted: int) -> int:
        """The most tokens up to ``wanted`` that fit, of clients that each fill their rows."""
        batch, length = self.memory.plan.batch, self.memory.plan.max_length

        def fits(rows: int) -> bool:
            return self._fits(slots=-(-rows // batch), rows=rows)

        most = -(-wanted // length)
        return wanted if fits(most) else length * _largest(fits, most - 1)

    def clients(self, tokens: int) -> int:
        """The most clients that fit in a pass of ``tokens``: shorter rows are of more of them.

        Not fewer than fill it with their rows, where that was asked for and is too much.
        """
        batch, length = self.memory.plan.batch, self.memory.plan.max_length
        rows = -(-tokens // length)

        def fits(slots: int) -> bool:
            return self._fits(slots=slots, rows=rows)

        full = min(MOST_CLIENTS, -(-rows // batch))
        return max(full, _largest(fits, MOST_CLIENTS))

    def _fits(self, *, slots: int, rows: int) -> bool:
        needed = self.memory.base_bytes + self.memory.step_bytes(slots=slots, rows=rows)
        return needed <= self.free_bytes


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to ``most`` that fits, 1 where none does; what fits, fits with less."""
    return max(1, bisect_left(range(1, most + 1), True, key=lambda number: not fits(number)))
