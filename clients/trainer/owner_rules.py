"""Hold each request to the owner's limits: before it is received, when it is decoded, as it runs.

    refuse_settings    what the run's configuration asks for, before any array is received
    refuse_job         the ranks of the factors that came
    begin              hours and quotas; counts the request and its rows
    Running.over       asked before every pass: seconds, hours, quotas

Nothing here is transient: the server need not send a refused message again. What a training did
that was ended does not count for the run (an update of fewer steps than were asked for would be
weighed like a whole one), and counts for the quotas.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from flwr.app import MessageType

from flexlora.clients.trainer.hours import Hours
from flexlora.clients.trainer.limits import DAY, WEEK, OwnerLimits, QuotaLimits
from flexlora.clients.trainer.quota_ledger import QuotaLedger, Use
from flexlora.config.resolve import Config
from flexlora.errors import UserError
from flexlora.lora.adapters import Adapter
from flexlora.training.schedule import TrainSettings, num_steps
from flexlora.wire.jobs import EvalJob, TrainJob

__all__ = ["OwnerRules", "Quota", "Running"]

WRITE_SECONDS = 10.0  # of work between two counts on disk
Quota = tuple[str, float, float]  # key, used, allowed


class OwnerRules:
    """The owner's limits, and what of the quotas is used; ``now`` is the wall's clock."""

    def __init__(
        self, limits: OwnerLimits, ledger: QuotaLedger, *, now: Callable[[], float] = time.time
    ) -> None:
        self.limits, self.ledger, self.now = limits, ledger, now
        self.hours = Hours.parse(limits.request.hours, "request.hours")

    def refuse_settings(self, message_type: str, config: Config, rows: Mapping[str, int]) -> None:
        """Refuse a run's configuration that asks for more than is allowed.

        A query is held to the limits of training: a node that cannot take part says so when it is
        met. ``rows`` are this node's, by split.

        Raises:
            UserError: names the key, what was asked and what is allowed.
        """
        limits = self.limits
        _refuse("train.max-length", config.train.max_length, limits.train.max_length)
        if message_type == MessageType.EVALUATE:
            held = rows.get(config.eval.split, 0)
            scored = min(config.eval.max_examples or held, held)
            _refuse("eval.max-examples", scored, limits.eval.max_examples)
            tokens = config.eval.max_new_tokens  # whether to generate, the message says
            _refuse("eval.max-new-tokens", tokens, limits.eval.max_new_tokens)
            _refuse("eval.batch-size", config.eval.batch_size, limits.eval.batch_size)
            return
        train, allowed = config.train, limits.train
        of_epochs = "" if train.max_steps else f" (train.num-train-epochs={train.num_train_epochs})"
        steps = _steps(config, rows)
        _refuse("train.max-steps", steps, allowed.max_steps, of_epochs)
        for key in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            name = f"train.{key.replace('_', '-')}"
            _refuse(name, getattr(train, key), getattr(allowed, key))
        _refuse("personal.rank", config.personal.rank, limits.personal.rank)
        if config.personal.rank:
            _refuse("personal.max-steps", config.personal.max_steps, limits.personal.max_steps)

    def refuse_job(self, job: TrainJob | EvalJob) -> None:
        """Refuse factors of a larger rank than is allowed, whatever their class is called.

        Raises:
            UserError: names the limit, what arrived and what is allowed.
        """
        limits = self.limits.request
        if isinstance(job, EvalJob):
            _refuse("request.adapters", len(job.adapters), limits.adapters)
            scored = max((_rank(adapter) for adapter in job.adapters.values()), default=0)
            _refuse("request.carried-rank", scored, limits.carried_rank)
            return
        batches = job.start.local.gradient_batches
        _refuse("request.gradient-batches", batches, limits.gradient_batches)
        start = job.start.for_client(job.client_id)
        _refuse("request.rank", _rank(start.trained), limits.rank)
        carried = _rank(start.carried) if start.carried is not None else 0
        _refuse("request.carried-rank", carried, limits.carried_rank)

    @contextmanager
    def begin(
        self, message_type: str, config: Config, rows: Mapping[str, int]
    ) -> Iterator[Running | None]:
        """Count a request and let it run; None for a query, which takes nothing.

        Raises:
            UserError: outside the hours, or a quota that is used up or would be.
            OSError: the use cannot be written, so nothing may be done.
        """
        if message_type == MessageType.QUERY:
            yield None
            return
        self.refuse_hours()
        training = message_type == MessageType.TRAIN
        use = Use(requests=1, rows=_trained_rows(config, rows) if training else 0)
        self.refuse_quotas(use)
        self.ledger.add(use, self.now())
        running = Running(self, left=self._left())
        try:
            yield running
        finally:
            running.count()

    def refuse_hours(self) -> None:
        """
        Raises:
            UserError: the node does not work at this time of day.
        """
        if not self.hours.has(self.now()):
            raise UserError(self.outside())

    def refuse_quotas(self, use: Use) -> None:
        """
        Raises:
            UserError: with ``use`` more than a quota would be used, or no second is left.
        """
        for span, allowed, used in self._spans():
            for key, more in (("requests", use.requests), ("rows", use.rows)):
                if getattr(used, key) + more > getattr(allowed, key):
                    raise UserError(_used_up(span, key, getattr(used, key), allowed, more))
        left, why = self._left()
        if left <= 0:
            raise UserError(why)

    def quotas(self) -> list[Quota]:
        """Every quota with what is used of it."""
        return [
            (f"{span}.{key}", float(getattr(used, key)), float(getattr(allowed, key)))
            for span, allowed, used in self._spans()
            for key in ("seconds", "requests", "rows")
        ]

    def _spans(self) -> list[tuple[str, QuotaLimits, Use]]:
        now = self.now()
        return [
            ("day", self.limits.day, self.ledger.used(DAY, now)),
            ("week", self.limits.week, self.ledger.used(WEEK, now)),
        ]

    def _left(self) -> tuple[float, str]:
        """The seconds that are left of the quotas, and the sentence for when they are over.

        The ledger counts by whole hours, and so a little more than the span: a quota as long as
        the span itself is none.
        """
        left = [(math.inf, "")]
        for (span, allowed, used), length in zip(self._spans(), (DAY, WEEK), strict=True):
            if allowed.seconds < length:
                sentence = _used_up(span, "seconds", max(used.seconds, allowed.seconds), allowed)
                left.append((allowed.seconds - used.seconds, sentence))
        return min(left)

    def outside(self) -> str:
        """The sentence for a time at which the node does not work."""
        clock = time.strftime("%H:%M", time.localtime(self.now()))
        return (
            f"it is {clock} at this node, and its owner allows requests at {self.hours.text} only "
            "(request.hours)."
        )


class Running:
    """One request at work; it began when this was made.

    ``left`` are the seconds that it may take of the quotas, and why it must end after them.
    """

    def __init__(self, rules: OwnerRules, *, left: tuple[float, str]) -> None:
        self._rules, self._left, self._began = rules, left, time.monotonic()
        self._counted = 0.0  # seconds that are on disk

    def over(self) -> str:
        """Why the request must end now, "" where it may go on."""
        rules, seconds = self._rules, time.monotonic() - self._began
        if seconds - self._counted >= WRITE_SECONDS:
            self.count()
        allowed = rules.limits.request.seconds
        if seconds > allowed:
            return (
                f"the request has run for {seconds:,.1f} s, and this node's owner allows "
                f"{allowed:,g} at most (request.seconds)."
            )
        left, why = self._left
        if seconds > left:
            return why
        return "" if rules.hours.has(rules.now()) else rules.outside()

    def count(self) -> None:
        """Write the seconds that are not on disk yet."""
        seconds = time.monotonic() - self._began
        self._rules.ledger.add(Use(seconds=seconds - self._counted), self._rules.now())
        self._counted = seconds


def _refuse(key: str, asked: int, allowed: int, remark: str = "") -> None:
    if asked > allowed:
        raise UserError(
            f"{key} is {asked:,}{remark}, and this node's owner allows {allowed:,} at most."
        )


def _used_up(span: str, key: str, used: float, allowed: QuotaLimits, more: int = 0) -> str:
    asked = f", and this request takes {more:,}" if more else ""
    return (
        f"this node's owner allows {getattr(allowed, key):,.0f} {key} a {span}, {used:,.0f} are "
        f"used{asked} ({span}.{key})."
    )


def _rank(adapter: Adapter) -> int:
    return max((factors.rank for factors in adapter.values()), default=0)


def _steps(config: Config, rows: Mapping[str, int]) -> int:
    """Steps of a round; of epochs over all train rows, those that are too long included."""
    return num_steps(rows.get("train", 0), TrainSettings(**dict(config.train)))


def _trained_rows(config: Config, rows: Mapping[str, int]) -> int:
    """Rows that pass through a round's training, personal steps included (``batch_plan``)."""
    held, size = rows.get("train", 0), config.train.examples_per_step
    personal = config.personal.max_steps if config.personal.rank else 0
    total = 0
    for steps in (_steps(config, rows), personal):
        epochs, rest = divmod(steps, max(1, math.ceil(held / size)))
        total += epochs * held + min(rest * size, held)
    return total
