"""FlexLoRA as a Flower strategy: the steps of a round, top to bottom.

    meet                query every node, assign every client a rank class
    configure_train     T_r(G) per rank class, one payload each; clients sampled by their own ids
    aggregate_train     decode, validate and add the replies as they come; then close the sum
    configure_evaluate  every class's adapter to the evaluating clients
    aggregate_evaluate  loss, exact match and ROUGE-L per class

then the rows are written, and then the checkpoint. Flower's own averaging is not used: it adds
factors of unequal rank by broadcasting, without an error.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from flexlora.aggregation import make_method
from flexlora.aggregation.engine.norm_bound import NormHistory
from flexlora.aggregation.engine.open_round import OpenRound
from flexlora.aggregation.engine.state import GlobalChange, State
from flexlora.config.resolve import Config
from flexlora.lora.adapters import Adapter
from flexlora.lora.ranks import RankClass
from flexlora.runs.folder import RunFolder
from flexlora.runs.outcomes import Outcome
from flexlora.runs.sources import Sources
from flexlora.server.members.membership import Membership
from flexlora.server.members.roster import Member, Roster
from flexlora.server.members.sampling import History
from flexlora.server.members.selection import Selector
from flexlora.server.observing.observer import Observer
from flexlora.server.robustness import check_enough, robust_mean
from flexlora.server.rounds.canary_rounds import CanaryRounds
from flexlora.server.rounds.central_privacy import CentralPrivacy
from flexlora.server.rounds.client_privacy import ClientPrivacy
from flexlora.server.rounds.client_rows import ClientRow, left_out_rows
from flexlora.server.rounds.evaluation import (
    eval_metrics,
    evaluation_messages,
    evaluation_results,
)
from flexlora.server.rounds.late_messages import LateMessages
from flexlora.server.rounds.replies import ReplyHandler
from flexlora.server.rounds.round_metrics import RoundMetrics, class_metrics, memory_metrics
from flexlora.server.rounds.round_plan import RoundPlan
from flexlora.server.rounds.round_records import write_round
from flexlora.server.rounds.secure_cohorts import check_cohort
from flexlora.server.rounds.secure_round import handler_for
from flexlora.server.rounds.skipped_rounds import SkippedRounds
from flexlora.server.settings import factoring_of
from flexlora.server.transport.clocks import (
    Clock,
    clock_of,
    is_measured,
    restore_clock,
)
from flexlora.server.transport.exchange import ask
from flexlora.server.transport.messages import content_bytes, pack
from flexlora.server.transport.retry_queue import PendingMessage
from flexlora.wire.encoding import DTYPES
from flexlora.wire.jobs import EvalResult

__all__ = ["FlexLoRAStrategy"]

LOG = logging.getLogger(__name__)
EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


class FlexLoRAStrategy(Strategy):
    """Heterogeneous-rank LoRA with exact aggregation, streamed replies and resume.

    Args:
        config: the configuration, checked by ``check_config``.
        run: the folder for rows, checkpoints and adapters; None writes nothing.
        observer: called at every event.
        state: the state to resume from; None starts from the base.
        rank_classes: the rank class of each client, after a resume.
    """

    def __init__(
        self,
        config: Config,
        *,
        run: RunFolder | None = None,
        observer: Observer | None = None,
        state: State | None = None,
        rank_classes: dict[str, RankClass] | None = None,
    ) -> None:
        self.config, self.run = config, run
        self.observer = observer or Observer()
        self.method = make_method(config.method.name, config.method)
        self.initial: State | None = None  # round 0 of a run that starts from another's
        self.closed = state  # the state of the last round that was written whole
        self.origin = ""  # Flower's id of the first run in this folder
        self.sources: Sources | None = None  # default: the base of the roster
        self.canaries: CanaryRounds | None = None  # of a simulation that is audited
        self.num_rounds = config.num_server_rounds
        shapes = state.change.shapes if state is not None else None
        say = self.observer.waiting
        self.membership = Membership(config, rank_classes or {}, shapes, say)
        self.selector = Selector(config, say=say)
        self.privacy = CentralPrivacy(config)
        self.client_privacy = ClientPrivacy(config)
        self.norms = NormHistory()
        self.metrics = RoundMetrics(server_round=0)
        self.late = LateMessages(config.server.late_rounds)
        self.skipped = SkippedRounds(config.server.skipped_rounds)
        self.ended = ""  # why the run ends before its last round
        self._state = state
        self._open: ReplyHandler | None = None
        self._eval_results: list[EvalResult] = []

    @property
    def state(self) -> State:
        """The global change after the last round.

        Raises:
            RuntimeError: neither ``state`` was given nor has ``start`` been called.
        """
        if self._state is None:
            raise RuntimeError("the strategy has no state, expected one after start(grid).")
        return self._state

    @property
    def roster(self) -> Roster:
        return self.membership.roster

    def summary(self) -> None:
        """The observer reports instead."""

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> Result:
        """Run the rounds after ``state`` until ``num_rounds`` count (default: the configuration's).

        Where too many were skipped in a row it ends earlier, and ``ended`` says so.
        ``initial_arrays`` and the two configs are ignored: round 0 is the base itself, and clients
        read their settings from the run's configuration. ``evaluate_fn`` gets the global adapter.

        Raises:
            UserError: too few nodes in time, no client can train, or the privacy budget is spent.
        """
        self.num_rounds = num_rounds or self.config.num_server_rounds
        timeout = timeout or self.config.server.round_timeout_seconds
        result, clock, first = Result(), clock_of(grid), 0
        if not self.roster.members:
            self.meet(grid, timeout)
        if self._state is not None:
            first = self._state.round + 1
        else:
            self._state = self.initial or self._zero()
        server_round, measured = first - 1, is_measured(grid)
        if server_round < self.last_round:
            self.privacy.check_start(len(self.roster.members), measured=measured)
            check_cohort(self.roster, self.config)
            check_enough(self.config, len(self.roster.members))
        self.skipped.limit *= measured
        while server_round < self.last_round and not self.ended:
            server_round += 1
            began = time.perf_counter()
            self.metrics = RoundMetrics(server_round=server_round, measured=measured)
            values: dict[str, Any] = {"round": server_round}
            if server_round > 0:
                values |= self._train(grid, server_round, timeout, result)
            if self.config.eval.due(server_round, self.last_round):
                values |= self._evaluate(grid, server_round, timeout, result)
            if evaluate_fn is not None:
                extra = evaluate_fn(server_round, self.global_arrays())
                result.evaluate_metrics_serverapp[server_round] = extra or MetricRecord()
            values["seconds"] = time.perf_counter() - began
            self._close_round(values, clock)
            cause = self.metrics.skipped
            self.ended = self.skipped.verdict(server_round, self.num_rounds, cause)
            if measured and not self.ended:
                self.skipped.pause(server_round, clock, self.config, self.observer.waiting)
        result.arrays = self.global_arrays()
        return result

    def _zero(self) -> State:
        """The base without any change."""
        dtype = DTYPES["float64" if self.config.wire.dtype == "float64" else "float32"]
        return State(round=0, change=GlobalChange.zero(self.roster.shapes, dtype))

    @property
    def last_round(self) -> int:
        """The number of the last round, from what was skipped and spent so far."""
        return min(self.skipped.extended(self.num_rounds), self.privacy.last_round)

    def restore(self, notes: Mapping[str, Any], grid: Grid) -> None:
        """Go on from a checkpoint's ``notes``: the clients' history, the clock, late messages."""
        if notes.get("history"):
            self.selector.history = History.from_dict(notes["history"])
        self.norms = NormHistory.from_dict(notes.get("norms", {}))
        self.privacy.restore(notes.get("privacy", {}))
        self.client_privacy.restore(notes.get("client_privacy", {}), grid)
        self.skipped.numbers = list(notes.get("skipped_rounds", []))
        self.skipped.limit *= is_measured(grid)
        waited = notes.get("under_way", {})
        if self.run is not None and self.state.round < self.last_round and waited:
            self.late.send_again(self.run, waited, grid, self.roster, self._plan)
        restore_clock(notes, clock_of(grid))

    def meet(self, grid: Grid, timeout: float | None = None) -> None:
        """Wait for nodes, query their capabilities, and assign every client its rank class."""
        timeout = timeout or self.config.server.round_timeout_seconds
        self.membership.meet(grid, timeout)
        self.observer.met(self.roster)

    def _train(
        self, grid: Grid, server_round: int, timeout: float, result: Result
    ) -> dict[str, Any]:
        clock = clock_of(grid)
        began = clock.now()
        joined, left_out = self.membership.admit(grid, server_round, timeout)
        if joined:
            self.observer.met(self.roster)
        self.metrics.rows += left_out_rows(server_round, left_out)
        messages = self.configure_train(server_round, ArrayRecord(), ConfigRecord(), grid)
        self.observer.round_started(server_round, self.last_round, len(messages))
        replies = self._handler.replies(grid, timeout)
        _, metrics = self.aggregate_train(server_round, replies)
        result.train_metrics_clientapp[server_round] = metrics
        seconds = clock.now() - began
        timed = self.metrics.apply_clock(clock, seconds)
        again = {"held_again": True} if self.metrics.skipped and self.skipped.limit else {}
        return {**metrics, **self.metrics.exceptions(), **self.privacy.ending(), **again, **timed}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Open the round: one message per sampled client, one payload per rank class."""
        self.selector.seed = self.privacy.sampling_seed
        private = self.privacy.gaussian_sum(server_round, len(self.roster.members))
        selected = self.selector.select(grid, self.roster, server_round)
        for client_id, cause in selected.backing_off.items():
            member = self.roster.members[client_id]
            row = ClientRow.of(member, server_round, Outcome.BACKING_OFF, cause)
            self.metrics.rows.append(row)
            LOG.warning("client %s, round %d: %s", client_id, server_round, cause)
        members = [self.roster.members[client_id] for client_id in selected.client_ids]
        plan = self._plan(self.state, members, server_round)
        if getattr(grid, "sends_again", False):
            self.late.open_round(self.state, members, clock_of(grid))
        starts = plan.sent | self.late.starts
        if private and self.method.needs.linear:  # the width of the noise is not the sample's
            classes = self.roster.rank_classes
            starts = RoundPlan.starts(self.method, self.state, classes, self.config) | starts
        self.metrics.bytes_carried = plan.bytes_carried
        self.metrics.memory_bytes = memory_metrics(plan.sent, self.config.train.optim)
        self._open = handler_for(self.config)(
            plan=plan,
            selected=selected,
            sent=starts,
            opened=OpenRound(
                self.method,
                self.state,
                starts,
                plan.asked,
                factor_gap=self.config.eval.factor_gap,
                bound=self.norms.bound(0.0 if private else self.config.server.max_norm_ratio),
                most_updates=0 if private else len(plan.asked) + len(self.late.pending),
                private=private,
                robust=robust_mean(self.config, len(plan.asked)),
            ),
            late=self.late,
            metrics=self.metrics,
            membership=self.membership,
            history=self.selector.history,
            observer=self.observer,
            config=self.config,
        )
        return [pending.message for pending in plan.pending if pending.message is not None]

    def _plan(self, state: State, members: Sequence[Member], server_round: int) -> RoundPlan:
        skipped = self.skipped.before(server_round)
        when = server_round, self.num_rounds, skipped
        return RoundPlan.of(self.method, state, members, self.config, *when, self.origin)

    @property
    def _handler(self) -> ReplyHandler:
        if self._open is None:
            raise RuntimeError("no round is open, expected configure_train before aggregate_train.")
        return self._open

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord]:
        """Add the replies one by one and close the sum; ``state`` is the next one afterwards."""
        handler, before = self._handler, self.state
        for reply in replies:
            handler.handle(reply)
        began = time.perf_counter()
        settled = handler.settle()
        quorum = 0 if self.privacy.active else self.config.server.quorum
        self.metrics.skipped = handler.skipped(quorum)
        if self.metrics.skipped:
            self._state = self.state.unchanged()
            self.skipped.add(server_round)
        else:
            self._state = handler.opened.close()
            self.privacy.spend(server_round, len(self.roster.members), handler.opened.sums)
            self.norms.learn(server_round, settled.norms)
        if self.canaries is not None:
            self.canaries.score(self, before)
        for client_id, rank_class in sorted(handler.lowered.items()):
            member = self.roster.members[client_id]
            self.roster.members[client_id] = replace(member, rank_class=rank_class)
        served = class_metrics(self.state, self.served(self.state), self.roster.rank_classes)
        seconds = time.perf_counter() - began
        if self.metrics.skipped:
            self.observer.round_skipped(server_round, self.metrics.skipped)
        epsilon = self.privacy.metrics()
        epsilon |= self.client_privacy.metrics(self.metrics.rows, self.roster)
        totals = {**self.metrics.totals(), **served, **epsilon}
        return None, MetricRecord({**totals, "server_seconds": seconds})

    def _evaluate(
        self, grid: Grid, server_round: int, timeout: float, result: Result
    ) -> dict[str, Any]:
        messages = self.configure_evaluate(server_round, ArrayRecord(), ConfigRecord(), grid)
        if server_round == 0:
            self.observer.round_started(server_round, self.last_round, len(messages))
        pending = [PendingMessage(message) for message in messages]
        replies = (reply for _, reply in ask(grid, pending, self.config, timeout) if reply)
        scores = self.aggregate_evaluate(server_round, replies)
        result.evaluate_metrics_clientapp[server_round] = scores
        return {"eval_bytes_down": sum(content_bytes(m.content) for m in messages), **scores}

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """To the same clients in every round, each with every class's adapter.

        Round 0 has none: it is the base, unless the run starts from another's.
        """
        begun = server_round > 0 or self.initial is not None
        served = self.served(self.state) if begun else {}
        when = server_round, self.last_round
        return evaluation_messages(served, self.roster, self.config, *when, self.origin)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord:
        """Sums over clients, then means: per rank class, and each client at its own class."""
        self._eval_results = evaluation_results(
            replies, self.roster, self.config, self.observer.evaluated
        )
        return MetricRecord({**eval_metrics(self._eval_results, self.roster)})

    def _close_round(self, values: dict[str, Any], clock: Clock) -> None:
        self.metrics.update_history(self.selector.history)
        write_round(self, values, self._eval_results, clock)
        self._eval_results, self.closed = [], self.state
        self.observer.round_finished(values)

    def served(
        self, state: State, rank_classes: Mapping[str, RankClass] | None = None
    ) -> dict[str, Adapter]:
        """The adapter of each rank class (default: the roster's) at ``state``, ready to use."""
        classes = self.roster.rank_classes if rank_classes is None else rank_classes
        return {
            name: self.method.start(state, rank_class, factoring_of(self.config)).served()
            for name, rank_class in classes.items()
        }

    def global_adapter(self, state: State) -> Adapter:
        """``G`` as one adapter at the server's full rank."""
        factoring = factoring_of(self.config)
        return state.change.full_rank_adapter(factoring.alpha, rslora=factoring.rslora)

    def global_arrays(self) -> ArrayRecord:
        """``global_adapter`` as Flower arrays, one for each factor."""
        arrays = pack(self.global_adapter(self.state), "float32").arrays
        return ArrayRecord(
            {k: Array(a.dtype, a.shape, a.stype, bytes(a.data)) for k, a in arrays.items()}
        )
