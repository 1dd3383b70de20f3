"""Answers of base, global and personal model to the same held-out prompts, for a run's page.

Taken once and kept in ``samples.json``: at the end of a simulation that generates answers, unless
it is private, or by ``flexlora report --samples``. The clients and rows are drawn by the seed.
Where classes carry more than they train, also the loss of ``T_r(G)`` alone, on drawn rows.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from torch import Tensor

from flexlora.aggregation.engine.starts import truncated
from flexlora.aggregation.engine.state import State
from flexlora.clients.worker import Worker, worker_for
from flexlora.config.resolve import resolved
from flexlora.data.collation import Example
from flexlora.errors import UserError, one_line
from flexlora.evaluation.generation import generate_answers
from flexlora.evaluation.likelihood import answer_token_losses
from flexlora.lora.adapters import Adapter
from flexlora.lora.ranks import RankClass
from flexlora.printable import printable
from flexlora.runs.folder import RunFolder
from flexlora.runs.samples_file import Sample, Samples, TruncatedLoss, write_samples
from flexlora.seeds import numpy_generator
from flexlora.server.settings import factoring_of
from flexlora.server.strategy import FlexLoRAStrategy
from flexlora.simulations.inspection import check_sources
from flexlora.training.out_of_memory import within_memory
from flexlora.training.personal_store import PersonalStore

__all__ = ["sample_run", "take_samples", "write_samples_of"]

LOG = logging.getLogger(__name__)
CLIENTS, ROWS = 6, 128  # whose answers are shown, and on how many rows a loss is compared
LONGEST_PROMPT, LONGEST_ANSWER = 600, 400  # characters


def sample_run(target: str) -> None:
    """``flexlora report RUN --samples``: take the samples of a run at its last checkpoint.

    Raises:
        UserError: no run, one whose rows stayed with its clients, or another base or other rows.
    """
    run, config = RunFolder.open(target)
    before = run.sources()
    if before is None or not before.rows:
        raise UserError(
            f"'{target}' has no samples: the rows of its clients are not on this machine. "
            "Samples are of simulations; leave --samples out."
        )
    state, by_client = run.load_checkpoint()
    worker = worker_for(resolved(config))
    model = config.model.name
    check_sources(before, worker.sources(), target=target, model=model, allow_changed=False)
    personal = PersonalStore(run.path / "personal")
    with run.writing("the samples"):
        write_samples(run.path, take_samples(worker, state, by_client, personal))


def write_samples_of(
    strategy: FlexLoRAStrategy, worker: Worker, out: Path, personal: PersonalStore
) -> None:
    """The samples of a run that has ended; what goes wrong is logged and fails no run."""
    config = worker.config
    if config.eval.generate == "never" or config.privacy.mode != "none":
        return
    classes = {name: member.rank_class for name, member in strategy.roster.members.items()}
    try:
        write_samples(out, take_samples(worker, strategy.state, classes, personal))
    except Exception as error:  # the run is whole without them
        LOG.warning("no samples were taken (%s): `flexlora report --samples`", one_line(error))


def take_samples(
    worker: Worker,
    state: State,
    by_client: Mapping[str, RankClass],
    personal: PersonalStore,
) -> Samples:
    """Answers under ``state`` to rows drawn by the seed, and the losses of ``T_r(G)``."""
    sampler = _Sampler(worker=worker, state=state, by_client=by_client, personal=personal)
    losses, rows = sampler.truncated_losses()
    return Samples(
        round=state.round,
        split=worker.config.eval.split,
        samples=tuple(sampler.answers()),
        rows=rows,
        losses=losses,
    )


@dataclass(frozen=True, kw_only=True)
class _Sampler:
    worker: Worker
    state: State
    by_client: Mapping[str, RankClass]
    personal: PersonalStore

    def answers(self) -> Iterator[Sample]:
        """One row of each drawn client, those of one base together."""
        chosen = sorted(self._drawn(), key=lambda pair: self.worker.quantization_of(pair[0]))
        for kind, of_base in groupby(chosen, lambda pair: self.worker.quantization_of(pair[0])):
            pairs = list(of_base)
            named = self._answers_on(kind, pairs)
            for at, (client_id, row) in enumerate(pairs):
                yield Sample(
                    client_id=client_id,
                    rank_class=self.by_client[client_id].name,
                    task=printable(row.task or "", 80),
                    prompt=_cut(row.prompt, LONGEST_PROMPT),
                    reference=_cut(row.answer, LONGEST_ANSWER),
                    answers={name: _cut(of[at], LONGEST_ANSWER) for name, of in named if at in of},
                )

    def _drawn(self) -> list[tuple[str, Example]]:
        """``(client, row)`` of up to ``CLIENTS`` clients, those with personal factors first."""
        clients = [c for c in self.worker.client_ids if c in self.by_client]
        order = numpy_generator(self.worker.config.seed, "samples").permutation(len(clients))
        drawn = sorted((clients[i] for i in order), key=lambda c: self._factors(c) is None)
        pairs = []
        for client_id in drawn:
            rows = self.worker.held_out(client_id)
            if rows:
                random = numpy_generator(self.worker.config.seed, "samples", client_id)
                pairs.append((client_id, rows[int(random.integers(len(rows)))]))
            if len(pairs) == CLIENTS:
                break
        return pairs

    def _factors(self, client_id: str) -> Adapter | None:
        """Personal factors of the class that the client is in."""
        stored = self.personal.before(client_id, self.state.round + 1)
        known = stored is not None and stored.rank_class == self.by_client[client_id].name
        return stored.adapter if stored is not None and known else None

    def _answers_on(
        self, kind: str, pairs: Sequence[tuple[str, Example]]
    ) -> list[tuple[str, dict[int, str]]]:
        """``(who answers, {place: answer})`` of every row on one base."""
        slots = self.worker.slots_of(kind)
        served = self._served({self.by_client[client_id].name for client_id, _ in pairs})
        adapters = [served[self.by_client[client_id].name] for client_id, _ in pairs]
        factors = {at: f for at, (c, _) in enumerate(pairs) if (f := self._factors(c)) is not None}
        rows = [row for _, row in pairs]
        try:
            slots.clear()
            (base,) = self._generated(kind, [rows])
            slots.load(adapters)
            shared = [texts[0] for texts in self._generated(kind, [[row] for row in rows])]
            found = [("base", dict(enumerate(base))), ("global", dict(enumerate(shared)))]
            if factors:
                carried = [adapters[at] for at in factors]
                slots.load(list(factors.values()), carried=carried)
                texts = self._generated(kind, [[rows[at]] for at in factors])
                own = {at: text[0] for at, text in zip(factors, texts, strict=True)}
                found.append(("personal", own))
        finally:
            slots.clear()
        return found

    def _generated(self, kind: str, examples: Sequence[Sequence[Example]]) -> list[list[str]]:
        worker = self.worker
        return generate_answers(
            worker.slots_of(kind),
            examples,
            tokenizer=worker.bases[kind].tokenizer,
            max_new_tokens=worker.config.eval.max_new_tokens,
            batch_size=worker.config.eval.batch_size,
            pad_token_id=worker.base.pad_token_id,
        )

    def _served(self, names: set[str]) -> dict[str, Adapter]:
        classes = {r.name: r for r in self.by_client.values() if r.name in names}
        return FlexLoRAStrategy(self.worker.config).served(self.state, classes)

    def truncated_losses(self) -> tuple[dict[str, TruncatedLoss], int]:
        """By class, and over how many rows; none where no class carries more than it trains."""
        classes = {r.name: r for r in sorted(self.by_client.values(), key=lambda r: r.largest)}
        strategy, factoring = FlexLoRAStrategy(self.worker.config), factoring_of(self.worker.config)
        starts = {n: strategy.method.start(self.state, r, factoring) for n, r in classes.items()}
        if all(start.carried is None for start in starts.values()):
            return {}, 0
        adapters = [start.served() for start in starts.values()]
        adapters += [truncated(self.state, r, factoring) for r in classes.values()]
        sums, tokens, count = [0.0] * len(adapters), 0, 0
        for kind, rows in self._drawn_rows().items():
            losses = self._losses(kind, rows, adapters)
            sums = [total + loss for total, loss in zip(sums, losses, strict=True)]
            tokens, count = tokens + sum(row.answer_tokens for row in rows), count + len(rows)
        means = [total / tokens for total in sums] if tokens else []
        halves = zip(classes, means, means[len(classes) :], strict=False)
        return {n: TruncatedLoss(served=s, truncated=t) for n, s, t in halves}, count

    def _drawn_rows(self) -> dict[str, list[Example]]:
        """Up to ``ROWS`` held-out rows of all clients, by the base of their client."""
        pairs = [
            (self.worker.quantization_of(c), row)
            for c in self.worker.client_ids
            for row in self.worker.held_out(c)
        ]
        random = numpy_generator(self.worker.config.seed, "samples", "rows")
        chosen = sorted(random.permutation(len(pairs))[:ROWS].tolist())
        rows: dict[str, list[Example]] = {}
        for at in chosen:
            rows.setdefault(pairs[at][0], []).append(pairs[at][1])
        return rows

    def _losses(
        self, kind: str, rows: Sequence[Example], adapters: Sequence[Adapter]
    ) -> list[float]:
        """The summed loss of the rows under each adapter.

        Raises:
            UserError: one row does not fit into memory.
        """
        slots = self.worker.slots_of(kind)

        def attempt(size: int) -> list[list[Tensor]]:
            return answer_token_losses(
                slots,
                [rows] * len(adapters),
                batch_size=size,
                pad_token_id=self.worker.base.pad_token_id,
            )

        try:
            slots.load(list(adapters))
            losses, _ = within_memory(attempt, self.worker.config.eval.batch_size)
        finally:
            slots.clear()
        if losses is None:
            raise UserError("out of memory with 1 row in an evaluation pass")
        return [sum(float(row.sum()) for row in of_adapter) for of_adapter in losses]


def _cut(text: str, most: int) -> str:
    """The beginning and the end of a long text."""
    if len(text) <= most:
        return text
    return f"{text[: most // 2]} [...] {text[-(most // 2) :]}"
