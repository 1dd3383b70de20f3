"""Which clients of a round go through the model together.

A cohort's pass is as wide as its longest row and as deep as its highest rank, so clients of alike
length and rank are packed together, up to a number of clients and of padded tokens. Both limits
come from a cost model, from ``flexlora tune`` or from the configuration, and stand in the resolved
configuration: the plan is a function of the round's clients, never of arrival or timing.

The cost model. On a CPU a pass of a few thousand tokens is as fast per token as any wider one, and
its activations stay near the caches. A GPU is filled: as many rows as its memory holds beside the
base, by the term-by-term prediction of ``flexlora/memory.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from flexlora.clients.worker import Worker

from flexlora.config import Config
from flexlora.data.collation import Example
from flexlora.errors import UserError
from flexlora.jobs import TrainJob
from flexlora.memory import training_memory
from flexlora.memory_ranks import run_plan

__all__ = ["CohortLimits", "limits_of", "plan_cohorts", "resolved_limits"]

CPU_TOKENS = 4096
CUDA_TOKENS = 1 << 16  # beyond it nothing is gained, and a lost cohort costs more
MOST_CLIENTS = 64
LENGTH_STEP = 32  # rows within so many tokens of each other are alike
KEPT_FREE = {"cpu": 0.5, "cuda": 0.2}  # of the free memory; the CPU's is everybody's


@dataclass(frozen=True, kw_only=True)
class CohortLimits:
    """At most ``clients`` in a pass, and at most ``tokens`` unless one client has more."""

    clients: int
    tokens: int = 1 << 62


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
    widths = {key: _width(rows(job.client_id)) for key, job in jobs.items()}

    def alike(key: str) -> tuple:
        job = jobs[key]
        plan = (job.start.trainable, repr(job.start.local), job.start.carried_dtype)
        return pass_key(job.client_id), plan

    def order(key: str) -> tuple:
        steps = -(-widths[key] // LENGTH_STEP)
        return (*alike(key), steps, jobs[key].start.rank_class.largest, jobs[key].client_id)

    def fits(keys: Sequence[str]) -> bool:
        tokens = len(keys) * batch_size * max(widths[key] for key in keys)
        return len(keys) <= limits.clients and tokens <= limits.tokens

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


def _width(rows: Sequence[Example]) -> int:
    return max((len(example.input_ids) for example in rows), default=1)


def limits_of(config: Config) -> CohortLimits:
    """The limits of a configuration in which they have been resolved."""
    return CohortLimits(clients=config["engine.cohort-size"], tokens=config["engine.cohort-tokens"])


def resolved_limits(config: Config, worker: Worker) -> Config:
    """The configuration with the cost model's limits in the place of zeros."""
    tokens = config["engine.cohort-tokens"] or _tokens(config, worker)
    # Who sets the number of clients alone means it.
    if config["engine.cohort-size"] and not config["engine.cohort-tokens"]:
        tokens = max(tokens, config["engine.cohort-size"] * _largest_pass(config))
    return config.replace(
        engine__cohort_size=config["engine.cohort-size"] or MOST_CLIENTS,
        engine__cohort_tokens=tokens,
    )


def _largest_pass(config: Config) -> int:
    return config["train.per-device-train-batch-size"] * config["train.max-length"]


def _tokens(config: Config, worker: Worker) -> int:
    kind = worker.base.device.type
    wanted = CPU_TOKENS if kind == "cpu" else CUDA_TOKENS
    per_row, held = _row_and_held_bytes(config)
    if not per_row:
        return min(wanted, 8 * _largest_pass(config))
    room = (1.0 - KEPT_FREE[kind]) * worker.free_bytes - held
    rows = max(1, int(room / per_row))
    return max(config["train.max-length"], min(wanted, rows * config["train.max-length"]))


def _row_and_held_bytes(config: Config) -> tuple[int, int]:
    """Bytes that one more row of a pass takes, and those that the first pass takes beside it.

    Nothing where the model's memory cannot be predicted. A row of a cohort brings its share of a
    client's factors and optimizer with it; the rank is the largest of the tiers, or 64.
    """
    try:
        shape, plan = run_plan(config)
    except UserError:
        return 0, 0
    tiers = config["ranks.tiers"].replace(",", " ").split()
    ranks = [int(tier) for tier in tiers if tier.isdigit()]
    largest = max(ranks) if config["ranks.policy"] == "tiers" and ranks else 64
    plan = replace(plan, rank=largest, quantization=config["model.quantization"])
    one, two = (training_memory(shape, replace(plan, batch=rows)).total for rows in (1, 2))
    return two - one, 2 * one - two
