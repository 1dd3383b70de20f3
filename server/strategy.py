"""FlexLoRA as a Flower strategy: the steps of a round, top to bottom.

    meet the nodes     what can each train; a rank class for each client; a table; later ones too
    configure_train    T_r(G) per rank class, one payload each; sampled by client id
    aggregate_train    replies are read as they come, checked, folded in; a bad one is left out,
                       a message that is lost is sent again, a node that loses them sits out
    configure_evaluate every class's adapter to the clients that evaluate
    aggregate_evaluate loss, exact match, ROUGE-L per class; then rows on disk, then the checkpoint

Never Flower's own averaging: it adds factors of unequal rank by broadcasting, without an error.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from flexlora.aggregation import make_method
from flexlora.aggregation.engine.method import Start, State
from flexlora.aggregation.engine.state import GlobalChange
from flexlora.config.resolve import Config
from flexlora.evaluation.evaluate import BASE
from flexlora.lora.adapters import Adapter
from flexlora.lora.ranks import RankClass
from flexlora.runs.folder import RunFolder
from flexlora.seeds import derive_seed
from flexlora.server.members.membership import Membership
from flexlora.server.members.roster import Member, Roster
from flexlora.server.members.sampling import History
from flexlora.server.members.selection import Selected, Selector, too_few
from flexlora.server.observing.observer import Observer
from flexlora.server.rounds.intake import Intake, OverdueBook
from flexlora.server.rounds.ledger import (
    RoundLedger,
    class_metrics,
    eval_metrics,
    evaluation_rows,
    left_out_rows,
    module_metrics,
)
from flexlora.server.rounds.opening import Opening
from flexlora.server.rounds.scoring import evaluation_messages, evaluation_results
from flexlora.server.rounds.underway import UnderWay, moment_of, return_to, unanswered
from flexlora.server.settings import check_config, factoring_of
from flexlora.server.transport.clocks import clock_of
from flexlora.server.transport.exchange import ask, exchange, resending_of
from flexlora.server.transport.messages import content_bytes, pack
from flexlora.server.transport.resending import Letter
from flexlora.wire.encoding import DTYPES
from flexlora.wire.jobs import EvalResult

__all__ = ["FlexLoRAStrategy"]

LOG = logging.getLogger(__name__)


class FlexLoRAStrategy(Strategy):
    """Heterogeneous-rank LoRA with exact aggregation, streamed replies and resume.

    Args:
        config: all keys, as ``Config.of({"ranks.tiers": "4,8"})``.
        run: where rows, checkpoints and adapters go; None keeps nothing.
        observer: told of every step; None tells nobody.
        state: the state to go on from, with the rank class of each client, after a resume.
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
        check_config(config)
        self.config, self.run, self.observer = config, run, observer
        self.method = make_method(config.method.name, config.method)
        self.state = self.closed = state  # closed: after the last round written down whole
        self.origin = ""  # Flower's id of the first run in this folder
        self.num_rounds = config.num_server_rounds
        self.membership = Membership(config, rank_classes or {})
        self.selector = Selector(config)
        self._selected = Selected()
        self._letters: dict[Letter, str] = {}  # and the client that each was written to
        self._sent: dict[str, Start] = {}
        self._asked: dict[str, str] = {}
        self._late = UnderWay(OverdueBook(config.server.late_rounds))
        self._class_bytes: dict[str, int] = {}
        self._ledger = RoundLedger(server_round=0)
        self._eval_results: list[EvalResult] = []

    def summary(self) -> None:
        """Nothing: the observer reports."""

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
        """Run rounds ``state.round + 1`` to ``num_rounds`` (default: the configuration's).

        ``initial_arrays`` and the two configs are not used: round 0 is the base itself, and clients
        read their settings from the run's configuration. ``evaluate_fn`` gets the global adapter.

        Raises:
            UserError: too few nodes in time, or no client that can train.
        """
        rounds = self.num_rounds = num_rounds or self.config.num_server_rounds
        limit = timeout or self.config.server.round_timeout_seconds
        config, result = ConfigRecord(), Result()
        if not self.roster.members:
            self.meet(grid, limit)
        first = self.state is None
        if self.state is None:
            dtype = DTYPES["float64" if self.config.wire.dtype == "float64" else "float32"]
            self.state = State(round=0, change=GlobalChange.zero(self.roster.shapes, dtype))
        clock = clock_of(grid)
        measured = not (clock.simulated or getattr(grid, "in_process", False))
        for server_round in range(0 if first else self.state.round + 1, rounds + 1):
            began, then = time.perf_counter(), clock.now()
            self._ledger = RoundLedger(server_round=server_round, measured=measured)
            metrics: dict[str, object] = {"round": server_round}
            if server_round > 0:
                self._welcome(grid, server_round, limit)
                messages = self.configure_train(server_round, ArrayRecord(), config, grid)
                self._tell("round_started", server_round, rounds, len(messages))
                replies = self._replies(grid, limit)
                _, trained = self.aggregate_train(server_round, replies)
                metrics |= trained or {}
                metrics |= self._ledger.account(clock, clock.now() - then)
                result.train_metrics_clientapp[server_round] = trained or MetricRecord()
            if self.config.eval.due(server_round, rounds):
                messages = self.configure_evaluate(server_round, ArrayRecord(), config, grid)
                metrics["eval_bytes_down"] = sum(content_bytes(m.content) for m in messages)
                if server_round == 0:
                    self._tell("round_started", server_round, rounds, len(messages))
                letters = [Letter(message) for message in messages]
                scored = ask(grid, letters, self.config, limit)
                scores = self.aggregate_evaluate(server_round, (r for _, r in scored if r))
                metrics |= scores or {}
                result.evaluate_metrics_clientapp[server_round] = scores or MetricRecord()
            if evaluate_fn is not None:
                extra = evaluate_fn(server_round, self.global_arrays())
                result.evaluate_metrics_serverapp[server_round] = extra or MetricRecord()
            metrics["seconds"] = time.perf_counter() - began
            self._close_round(metrics, moment_of(clock))
        result.arrays = self.global_arrays()
        return result

    def go_on(self, notes: Mapping, grid: Grid) -> None:
        """Take up what an earlier process of this run had come to know."""
        if notes.get("history"):
            self.selector.history = History.from_dict(notes["history"])
        waited = notes.get("under_way", {})
        if self.state is not None and self.state.round < self.num_rounds and waited:
            self._late.send_again(self.run, waited, grid, self.roster, opening=self._opening)
        return_to(notes, clock_of(grid))

    @property
    def roster(self) -> Roster:
        """Who takes part, at which rank."""
        return self.membership.roster

    def meet(self, grid: Grid, timeout: float | None = None) -> None:
        """Wait for nodes, ask what each can train, and give every client its rank class."""
        self.membership.meet(grid, timeout or self.config.server.round_timeout_seconds)
        self._tell("met", self.roster)

    def _welcome(self, grid: Grid, server_round: int, timeout: float) -> None:
        joined, left_out = self.membership.welcome(grid, server_round, timeout)
        if joined:
            self._tell("met", self.roster)
        self._ledger.leave_out(left_out)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """One message per sampled client; clients of a class share one payload."""
        self._selected = self.selector.select(grid, self.roster, server_round)
        asked = [self.roster.members[client_id] for client_id in self._selected.client_ids]
        opening = self._opening(self.state, asked, server_round)
        if getattr(grid, "sends_again", False):
            self._late.opened(self.state, asked, clock_of(grid))
        self._sent, self._asked = opening.sent, opening.asked
        self._class_bytes = opening.class_bytes
        self._ledger.bytes_carried = opening.bytes_carried
        self._ledger.bytes_down = sum(self._class_bytes[name] for name in self._asked.values())
        self._ledger.sit_out(self.roster, self._selected.resting)
        for client_id, cause in self._selected.resting.items():
            LOG.warning("client %s, round %d: %s", client_id, server_round, cause)
        messages = opening.messages()
        self._letters = {Letter(message): client_id for client_id, message in messages.items()}
        return list(messages.values())

    def _opening(self, state: State, asked: Sequence[Member], server_round: int) -> Opening:
        return Opening.of(
            self.method,
            state,
            asked,
            self.config,
            server_round=server_round,
            num_rounds=self.num_rounds,
            fingerprint=self.roster.fingerprint,
            origin=self.origin,
        )

    def _replies(self, grid: Grid, timeout: float) -> Iterable[Message]:
        """Replies as they come, overdue ones among them; who sends none gets its row here."""
        silent: list[tuple[Letter, str]] = []
        needed, clock = self._selected.needed, clock_of(grid)

        def enough() -> bool:
            return bool(self._letters) and self._intake.counted >= needed

        for letter, reply in exchange(
            grid,
            self._letters,
            timeout=timeout,
            resending=resending_of(grid, self.config, timeout),
            overdue=self._late.book.letters,
            enough=enough,
            told=self._resent,
            forward=lambda letter: self.membership.forward(
                grid, letter, self._letters[letter], self._ledger.server_round
            ),
            turns=self._turns(needed),
        ):
            if reply is not None:
                yield reply
            else:
                silent.append((letter, self._letters[letter]))
        satisfied = enough()
        for letter, client_id in silent:
            member = self.roster.members[client_id]
            if satisfied:
                self._intake.unneeded(member, f"{needed} updates came first", letter=letter)
            else:
                self._intake.missing(member, f"no reply within {timeout:g} s", letter=letter)
        starts = {client_id: self._sent[name] for client_id, name in self._asked.items()}
        late = unanswered(self._letters, starts, self._ledger.server_round)
        self._late.keep(late if not satisfied else (), self._ledger.server_round, clock)
        for letter in self._letters:
            letter.forget()
        if not clock.simulated:
            self._remember_losses(satisfied)

    def _resent(self, letter: Letter, cause: str) -> None:
        client_id = self._letters[letter]
        self._ledger.resent += 1
        self._ledger.bytes_down += self._class_bytes[self._asked[client_id]]
        if hasattr(self.observer, "resent"):
            self._tell("resent", client_id, letter.sent, cause)

    def _remember_losses(self, satisfied: bool) -> None:
        """For back-off: silence is a loss unless enough others came first."""
        for letter, client_id in self._letters.items():
            if letter.answered:
                self.selector.history.hear(client_id)
            elif letter.error is not None or not satisfied:
                self.selector.history.lose(client_id, self._ledger.server_round)

    def _turns(self, needed: int) -> dict[Letter, int]:
        """Drawn where more are asked than needed: by id, the last ones would never count."""
        purpose = (self.config.seed, "arrival", self._ledger.server_round)
        letters = self._letters.items() if needed < len(self._letters) else ()
        return {letter: derive_seed(*purpose, client_id) for letter, client_id in letters}

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold in the replies one by one and close the round's sum; ``state`` is the next one."""
        starts = self._sent | self._late.book.starts
        self._intake = Intake(
            opened=self.method.begin(self.state, starts, self._asked),
            sent=starts,
            class_bytes=self._class_bytes,
            ledger=self._ledger,
            max_norm=self.config.method.max_update_norm,
            tell=lambda client_id, cause: self._tell("replied", client_id, cause),
            late_weight=self.config.server.late_weight,
        )
        done: set[Letter] = set()
        for reply in replies:
            self._take(server_round, reply, done)
        began = time.perf_counter()
        quorum, counted = self.config.server.quorum, self._intake.counted + self._intake.late
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

    def _take(self, server_round: int, reply: Message, done: set[Letter]) -> None:
        """One reply: to a letter of this round, to an overdue one, or to nothing at all."""
        message_id, members = reply.metadata.reply_to_message_id, self.roster.members
        letter = next((own for own in self._letters if own.wrote(message_id)), None)
        overdue = None if letter is not None else self._late.book.take(message_id)
        if letter is not None and letter not in done:
            done.add(letter)
            self._intake.take(members[self._letters[letter]], reply, letter=letter)
        elif overdue is not None:
            if not reply.has_error():
                self.selector.history.hear(overdue.client_id)
            self._intake.take(members[overdue.client_id], reply, overdue)
            self._ledger.came_late(self._late.spent(overdue))
        else:
            what = "a second reply" if letter is not None else "a reply to nothing that was sent"
            sender = self._letters[letter] if letter else f"node {reply.metadata.src_node_id}"
            LOG.warning("%s: %s in round %d, dropped", sender, what, server_round)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """The same clients every time, each with every class's adapter (round 0: none)."""
        return evaluation_messages(
            self.served(self.state),
            self.roster,
            self.config,
            server_round=server_round,
            num_rounds=self.num_rounds,
            origin=self.origin,
        )

    def served(
        self, state: State, rank_classes: Mapping[str, RankClass] | None = None
    ) -> dict[str, Adapter]:
        """The adapter that each rank class (default: those met) would be given to use."""
        classes = self.roster.rank_classes if rank_classes is None else rank_classes
        return {
            name: self.method.start(state, rank_class, factoring_of(self.config)).served()
            for name, rank_class in classes.items()
        }

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Sums over clients, then means: per rank class, and each client at its own class."""

        def told(result: EvalResult) -> None:
            if result.cause or server_round == 0:
                cause = f"evaluation: {result.cause}" if result.cause else ""
                self._tell("replied", result.client_id, cause)

        self._eval_results = evaluation_results(replies, self.roster, told=told)
        return MetricRecord(eval_metrics(self._eval_results, self.roster, base=BASE))

    def _close_round(self, metrics: dict[str, object], moment: Mapping) -> None:
        """Rows first, then the checkpoint: what a crash between them leaves is rewound."""
        server_round, history = self._ledger.server_round, self.selector.history
        self._ledger.teach(history)
        if self.run is not None:
            rows = left_out_rows(self.roster) if server_round == 0 else self._ledger.rows
            rows = sorted(rows, key=lambda row: str(row["client_id"]))
            evaluations = evaluation_rows(server_round, self._eval_results)
            if server_round > 0:
                metrics["modules"] = module_metrics(self.state, self.roster.rank_classes)
            self.run.append_round(metrics, rows, evaluations)
            classes = {k: member.rank_class for k, member in self.roster.members.items()}
            waited = self._late.write(self.run)
            notes = {"history": history.to_dict(), "under_way": waited, **moment}
            self.run.save_checkpoint(self.run.checkpoint, self.state, classes, notes)
            self._late.tidy(self.run, waited)
        self._eval_results, self.closed = [], self.state
        self._tell("round_finished", metrics)

    def global_arrays(self) -> ArrayRecord:
        """The global adapter at the server's full rank as Flower arrays."""
        lora = self.config.lora
        adapter = self.state.change.full_rank_adapter(lora.alpha, rslora=lora.rslora)
        return pack(adapter, "float32").arrays

    def _tell(self, event: str, *args: object) -> None:
        if self.observer is not None:
            getattr(self.observer, event)(*args)


def _unchanged(state: State) -> State:
    """The state after a round that changes nothing."""
    return replace(state, round=state.round + 1, dropped_energy=0.0, modules={})
