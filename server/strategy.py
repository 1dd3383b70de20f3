"""FlexLoRA as a Flower strategy: the steps of a round, top to bottom.

    meet the nodes     what can each train; a rank class for each client; a table
    configure_train    T_r(G) per rank class, one payload each; sampled by client id
    aggregate_train    replies are read as they come, checked, folded in; a bad one is left out
    configure_evaluate every class's adapter to the clients that evaluate
    aggregate_evaluate loss, exact match, ROUGE-L per class; then rows on disk, then the checkpoint

Never Flower's own averaging: it adds factors of unequal rank by broadcasting, without an error.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from flexlora.server.clocks import clock_of
from flexlora.server.exchange import exchange
from flexlora.server.intake import Intake, Overdue, OverdueBook
from flexlora.server.ledger import (
    RoundLedger,
    class_metrics,
    eval_metrics,
    evaluation_rows,
    left_out_rows,
    module_metrics,
)
from flexlora.server.messages import (
    Payload,
    content_bytes,
    decode_capability,
    decode_evaluate,
    eval_content,
    pack,
    train_content,
)
from flexlora.server.observer import Observer
from flexlora.server.roster import Roster, sample
from flexlora.server.sampling import History
from flexlora.server.selection import Selected, Selector, too_few, wait_for_nodes
from flexlora.server.settings import ServerSettings
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from flexlora.adapters import Adapter
from flexlora.aggregation import make_method
from flexlora.aggregation.base import Start, State
from flexlora.aggregation.state import GlobalChange
from flexlora.evaluation import BASE
from flexlora.jobs import Capability, EvalResult
from flexlora.ranks import RankClass
from flexlora.runs import RunFolder
from flexlora.wire import DTYPES, over_the_wire

__all__ = ["FlexLoRAStrategy"]


class FlexLoRAStrategy(Strategy):
    """Heterogeneous-rank LoRA with exact aggregation, streamed replies and resume.

    Args:
        settings: everything the server must know; ``ServerSettings.from_config(Config(...))``.
        run: where rows, checkpoints and adapters go; None keeps nothing.
        observer: told of every step; None tells nobody.
        state: the state to go on from, with the rank class of each client, after a resume.
    """

    def __init__(
        self,
        settings: ServerSettings,
        *,
        run: RunFolder | None = None,
        observer: Observer | None = None,
        state: State | None = None,
        rank_classes: dict[str, RankClass] | None = None,
    ) -> None:
        self.settings, self.run, self.observer = settings, run, observer
        self.method = make_method(settings.method, **vars(settings.method_options))
        self.state, self.known_classes = state, rank_classes or {}
        self.closed = state  # the state of the last round that was written down whole
        self.num_rounds = settings.num_server_rounds
        self.roster, self.selector = Roster(), Selector(settings)
        self._selected = Selected()
        self._sent: dict[str, Start] = {}
        self._asked: dict[str, str] = {}
        self._overdue = OverdueBook(settings.late_rounds)
        self._class_bytes: dict[str, int] = {}
        self._ledger = RoundLedger(server_round=0)
        self._eval_results: list[EvalResult] = []

    def summary(self) -> None:
        """Nothing beyond what the observer is told."""

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run rounds ``state.round + 1`` to ``num_rounds`` (default: the settings').

        ``initial_arrays`` and the two configs are not used: round 0 is the base itself, and clients
        read their settings from the run's configuration. ``evaluate_fn`` gets the global adapter.

        Raises:
            UserError: too few nodes in time, or no client that can train.
        """
        rounds = self.num_rounds = num_rounds or self.settings.num_server_rounds
        limit = timeout or self.settings.round_timeout_seconds
        config, result = ConfigRecord(), Result()
        if not self.roster.members:
            self.meet(grid, limit)
        first = self.state is None
        if self.state is None:
            dtype = DTYPES["float64" if self.settings.wire_dtype == "float64" else "float32"]
            self.state = State(round=0, change=GlobalChange.zero(self.roster.shapes, dtype))
        clock = clock_of(grid)
        for server_round in range(0 if first else self.state.round + 1, rounds + 1):
            began, then = time.perf_counter(), clock.now()
            self._ledger = RoundLedger(server_round=server_round)
            metrics: dict[str, object] = {"round": server_round}
            if server_round > 0:
                messages = self.configure_train(server_round, ArrayRecord(), config, grid)
                self._tell("round_started", server_round, rounds, len(messages))
                replies = self._replies(grid, messages, limit)
                _, trained = self.aggregate_train(server_round, replies)
                metrics |= trained or {}
                metrics |= self._ledger.account(clock, clock.now() - then)
                result.train_metrics_clientapp[server_round] = trained or MetricRecord()
            if self.settings.evaluates(server_round, rounds):
                messages = self.configure_evaluate(server_round, ArrayRecord(), config, grid)
                metrics["eval_bytes_down"] = sum(content_bytes(m.content) for m in messages)
                if server_round == 0:
                    self._tell("round_started", server_round, rounds, len(messages))
                scores = self.aggregate_evaluate(
                    server_round, (r for _, r in exchange(grid, messages, timeout=limit) if r)
                )
                metrics |= scores or {}
                result.evaluate_metrics_clientapp[server_round] = scores or MetricRecord()
            if evaluate_fn is not None:
                extra = evaluate_fn(server_round, self.global_arrays())
                result.evaluate_metrics_serverapp[server_round] = extra or MetricRecord()
            metrics["seconds"] = time.perf_counter() - began
            self._close_round(metrics, clock.now() if clock.simulated else None)
        result.arrays = self.global_arrays()
        return result

    def go_on(self, notes: Mapping, grid: Grid) -> None:
        """Take up what an earlier process of this run had come to know."""
        if notes.get("history"):
            self.selector.history = History.from_dict(notes["history"])
        if notes.get("simulated_now") is not None:
            clock_of(grid).set(notes["simulated_now"])

    def meet(self, grid: Grid, timeout: float | None = None) -> None:
        """Wait for nodes, ask what each can train, and give every client its rank class."""
        timeout = timeout or self.settings.round_timeout_seconds
        nodes = wait_for_nodes(grid, self.settings)
        queries = [
            Message(RecordDict(), dst_node_id=node, message_type=MessageType.QUERY)
            for node in nodes
        ]
        reports = {
            node: decode_capability(reply)
            if reply is not None
            else Capability.failed(f"node_{node}", "no answer to the query")
            for node, reply in exchange(grid, queries, timeout=timeout)
        }
        self.roster = Roster.meet(reports, self.settings.rank_policy, self.known_classes)
        self._tell("met", self.roster)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """One message per sampled client; clients of a class share one payload."""
        settings, state = self.settings, self.state
        self._selected = self.selector.select(grid, self.roster, server_round)
        chosen = self._selected.client_ids
        members = [self.roster.members[client_id] for client_id in chosen]
        classes = {m.rank_class.name: m.rank_class for m in members}
        starts = {
            name: self.method.start(state, rank_class, settings.factoring)
            for name, rank_class in sorted(classes.items())
        }
        contents = {
            name: train_content(
                start,
                self._payloads(start),
                server_round=server_round,
                num_server_rounds=self.num_rounds,
                fingerprint=self.roster.fingerprint,
            )
            for name, start in starts.items()
        }
        self._sent = {name: self._as_received(start) for name, start in starts.items()}
        self._asked = {m.capability.client_id: m.rank_class.name for m in members}
        self._ledger.bytes_carried = sum(
            self._sent[name].carried_bytes for name in self._asked.values()
        )
        self._class_bytes = {name: content_bytes(content) for name, content in contents.items()}
        self._ledger.bytes_down = sum(self._class_bytes[m.rank_class.name] for m in members)
        return [
            Message(
                contents[member.rank_class.name],
                dst_node_id=member.node_id,
                message_type=MessageType.TRAIN,
                group_id=str(server_round),
            )
            for member in members
        ]

    def _payloads(self, start: Start) -> dict[str, Payload]:
        dtype = self.settings.wire_dtype
        payloads = {"trained": pack(start.trained, dtype)}
        if start.carried is not None:
            payloads["carried"] = pack(start.carried, start.carried_dtype or dtype)
        return payloads

    def _as_received(self, start: Start) -> Start:
        """The start as the client decodes it: what a residual form must subtract."""
        dtype = self.settings.wire_dtype
        carried = start.carried
        if carried is not None:
            carried = over_the_wire(carried, start.carried_dtype or dtype)
        trained = over_the_wire(start.trained, dtype)
        return replace(start, trained=trained, carried=carried).sealed()

    def _replies(self, grid: Grid, messages: list[Message], timeout: float) -> Iterable[Message]:
        """Replies as they come, overdue ones among them; who sends none gets its row here."""
        silent = {m.metadata.dst_node_id for m in messages}
        unanswered: dict[str, int] = {}
        needed = self._selected.needed
        for node, reply in exchange(
            grid,
            messages,
            timeout=timeout,
            overdue=self._overdue.nodes,
            unanswered=unanswered,
            enough=lambda: bool(messages) and self._intake.counted >= needed,
        ):
            if reply is not None:
                if reply.metadata.reply_to_message_id not in self._overdue:
                    silent.discard(node)
                yield reply
        satisfied = bool(messages) and self._intake.counted >= needed
        self._keep_overdue({} if satisfied else unanswered)
        for member in self.roster.members.values():
            if member.node_id not in silent:
                continue
            if satisfied:
                self._intake.unneeded(member, f"{needed} updates came first")
            else:
                self._intake.missing(member, f"no reply within {timeout:g} s")

    def _keep_overdue(self, unanswered: Mapping[str, int]) -> None:
        """Messages of this round without an answer join those that are waited for in the next."""
        server_round = self._ledger.server_round
        by_node = {member.node_id: member for member in self.roster.members.values()}
        more = {}
        for message_id, node in unanswered.items():
            start = self._sent[by_node[node].rank_class.name]
            more[message_id] = Overdue(node_id=node, server_round=server_round, start=start)
        self._overdue.keep(more, server_round)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold in the replies one by one and close the round's sum; ``state`` is the next one."""
        by_node = {member.node_id: member for member in self.roster.members.values()}
        starts = self._sent | self._overdue.starts
        self._intake = Intake(
            opened=self.method.begin(self.state, starts, self._asked),
            sent=starts,
            class_bytes=self._class_bytes,
            ledger=self._ledger,
            max_norm=self.settings.max_update_norm,
            tell=lambda client_id, cause: self._tell("replied", client_id, cause),
        )
        for reply in replies:
            member = by_node.get(reply.metadata.src_node_id)
            if member is not None:
                late = self._overdue.take(reply.metadata.reply_to_message_id)
                self._intake.take(member, reply, late)
        began = time.perf_counter()
        quorum, counted = self.settings.quorum, self._intake.counted + self._intake.late
        cause = self._selected.cause
        if not cause and counted < quorum:
            cause = too_few(counted, quorum, "updates came")
        self.state = _unchanged(self.state) if cause else self._intake.opened.finish()
        for client_id, rank_class in sorted(self._intake.lowered.items()):
            member = self.roster.members[client_id]
            self.roster.members[client_id] = replace(member, rank_class=rank_class)
        served = self.served(self.state)
        metrics = self._ledger.metrics() | class_metrics(self.state, served)
        metrics["server_seconds"] = time.perf_counter() - began
        if cause:
            self._ledger.skipped = cause
            self._tell("replied", f"round {server_round}", cause)
        return None, MetricRecord(metrics)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """The same clients every time, each with every class's adapter (round 0: none)."""
        settings = self.settings
        count = max(1, round(settings.eval_fraction * len(self.roster.members)))
        chosen = sample(self.roster.members, count, seed=settings.seed, purpose=("evaluate",))
        payloads = {
            name: pack(adapter, settings.wire_dtype)
            for name, adapter in self.served(self.state).items()
            if server_round > 0
        }
        content = eval_content(
            payloads,
            server_round=server_round,
            generate=settings.generates(server_round, self.num_rounds),
            fingerprint=self.roster.fingerprint,
        )
        return [
            Message(
                content,
                dst_node_id=self.roster.members[client_id].node_id,
                message_type=MessageType.EVALUATE,
                group_id=str(server_round),
            )
            for client_id in chosen
        ]

    def served(
        self, state: State, rank_classes: Mapping[str, RankClass] | None = None
    ) -> dict[str, Adapter]:
        """The adapter that each rank class (default: those met) would be given to use."""
        classes = self.roster.rank_classes if rank_classes is None else rank_classes
        return {
            name: self.method.start(state, rank_class, self.settings.factoring).served()
            for name, rank_class in classes.items()
        }

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Sums over clients, then means: per rank class, and each client at its own class."""
        self._eval_results = []
        by_node = {member.node_id: member for member in self.roster.members.values()}
        for reply in replies:
            result = decode_evaluate(reply)
            member = by_node.get(reply.metadata.src_node_id)
            if member is None:
                continue
            client_id = member.capability.client_id
            if not result.cause and result.client_id != client_id:
                result = EvalResult(client_id=client_id, cause=f"replied as '{result.client_id}'")
            if result.cause or server_round == 0:
                cause = f"evaluation: {result.cause}" if result.cause else ""
                self._tell("replied", client_id, cause)
            self._eval_results.append(result)
        return MetricRecord(eval_metrics(self._eval_results, self.roster, base=BASE))

    def _close_round(self, metrics: dict[str, object], simulated: float | None = None) -> None:
        """Rows first, then the checkpoint: what a crash between them leaves is rewound."""
        server_round, history = self._ledger.server_round, self.selector.history
        for row in self._ledger.rows:
            if row["status"] == "ok":
                took = row.get("simulated_seconds") or row["seconds"]
                history.learn(row["client_id"], server_round, row["train_loss"], took)
        if self.run is not None:
            rows = left_out_rows(self.roster) if server_round == 0 else self._ledger.rows
            rows = sorted(rows, key=lambda row: str(row["client_id"]))
            evaluations = evaluation_rows(server_round, self._eval_results)
            if server_round > 0:
                metrics["modules"] = module_metrics(self.state, self.roster.rank_classes)
            self.run.append_round(metrics, rows, evaluations)
            classes = {k: member.rank_class for k, member in self.roster.members.items()}
            notes = {"history": history.to_dict(), "simulated_now": simulated}
            self.run.save_checkpoint(self.run.checkpoint, self.state, classes, notes)
        self._eval_results, self.closed = [], self.state
        self._tell("round_finished", metrics)

    def global_arrays(self) -> ArrayRecord:
        """The global adapter at the server's full rank as Flower arrays."""
        factoring = self.settings.factoring
        adapter = self.state.change.full_rank_adapter(factoring.alpha, rslora=factoring.rslora)
        return pack(adapter, "float32").arrays

    def _tell(self, event: str, *args: object) -> None:
        if self.observer is not None:
            getattr(self.observer, event)(*args)


def _unchanged(state: State) -> State:
    """The state after a round that changes nothing."""
    return replace(state, round=state.round + 1, dropped_energy=0.0, modules={})
