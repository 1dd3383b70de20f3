"""One run of the experiment on hostile clients: the honest ones' scores, a backdoor's success."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from flexlora.aggregation import make_method
from flexlora.clients.worker import worker_for
from flexlora.config.resolve import Config
from flexlora.data.clients import client_rows
from flexlora.data.collation import Example, encode_rows
from flexlora.data.poisoning import parse_hostile, triggered
from flexlora.evaluation.evaluate import evaluate
from flexlora.printable import from_cell
from flexlora.runs.audit import AUDIT_FILE
from flexlora.runs.checkpoints import load_checkpoint
from flexlora.runs.folder import RunFolder
from flexlora.server.observing.observer import Observer
from flexlora.server.settings import factoring_of
from flexlora.simulations.simulate import simulate
from flexlora.wire.jobs import EvalJob

__all__ = ["SHARE", "BackdoorObserver", "honest_scores", "hostile_run"]

SHARE = 0.2  # of the clients that are hostile
TRIGGERED_ROWS = 40
MOST_TOKENS = 6  # of an answer that is only compared with the target


class BackdoorObserver(Observer):
    """After every round: the share of triggered rows with the target as answer, by rank class."""

    def __init__(self, run: Path, config: Config, honest: Sequence[str]) -> None:
        self.run, self.config, self.honest = run, config, honest
        self.rounds: list[dict[str, float]] = []
        self._rows: list[Example] = []

    def round_finished(self, metrics: Mapping[str, object]) -> None:
        """Evaluate the round's checkpoint, which is on disk before observers are called."""
        state, of_client = load_checkpoint(self.run / "checkpoint")
        if state.round == 0:
            return
        method = make_method(self.config.method.name, self.config.method)
        classes = sorted(set(of_client.values()), key=lambda one: one.rank)
        served = {
            one.name: method.start(state, one, factoring_of(self.config)).served()
            for one in classes
        }
        worker = worker_for(self.config)
        self._rows = self._rows or self._triggered()
        (result,) = evaluate(
            worker.slots,
            worker.base,
            [EvalJob(client_id="", server_round=state.round, adapters=served, generate=True)],
            [self._rows],
            batch_size=self.config.eval.batch_size,
            max_new_tokens=MOST_TOKENS,
        )
        rates = {name: s.exact_match / s.generated for name, s in result.scores.items()}
        self.rounds.append({"round": state.round, **rates})

    def _triggered(self) -> list[Example]:
        """Test rows of honest clients, evenly from all of them, with the trigger and the target."""
        worker, data = worker_for(self.config), self.config.data
        clients = client_rows(
            path=data.path,
            name=data.name,
            kind=data.partition,
            num_clients=self.config.clients.count,
            dirichlet_alpha=data.dirichlet_alpha,
            seed=self.config.seed,
            tasks=data.tasks,
        )
        rows = [triggered(row) for name in self.honest for row in clients[name].get("test", [])]
        examples, _ = encode_rows(
            rows[:: max(1, len(rows) // TRIGGERED_ROWS)],
            tokenizer=worker.base.tokenizer,
            template=data.template,
            max_length=self.config.train.max_length,
            date=data.template_date,
        )
        return examples


def hostile_run(config: Config, out: Path) -> dict[str, object]:
    """Loss and exact match of the honest clients, and a backdoor's success by round.

    Without an attack the honest clients are those that would be with one.
    """
    worker = worker_for(config)
    hostile = parse_hostile(config.population.hostile or f"sign-flip:{SHARE}")
    assert hostile is not None
    evil = hostile.clients(worker.client_ids, config.seed)
    honest = [client_id for client_id in worker.client_ids if client_id not in evil]
    backdoor = config.population.hostile.startswith("backdoor")
    observer = BackdoorObserver(out, config, honest) if backdoor else None
    simulate(config, out, observer=observer, overwrite=True)
    scores: dict[str, object] = {**honest_scores(out, honest), **_weights(out, honest)}
    if observer is not None:
        scores["rounds"] = observer.rounds
    return scores


def honest_scores(out: Path, honest: Sequence[str]) -> dict[str, float]:
    """Means over the rows of these clients in the last round, each at its own rank class."""
    _, classes = load_checkpoint(out / "checkpoint")
    rows = _table(out, "evaluation.csv")
    last = max(int(row["round"]) for row in rows)
    loss = match = count = 0.0
    for row in rows:
        client_id = from_cell(row["client_id"])
        own = client_id in honest and row["rank_class"] == classes[client_id].name
        if own and int(row["round"]) == last:
            size = int(row["rows"])
            loss += size * float(row["eval_loss"])
            match += size * float(row["eval_exact_match"])
            count += size
    return {"loss": loss / count, "exact match": match / count}


def _weights(out: Path, honest: Sequence[str]) -> dict[str, float]:
    """The mean weight of a client in a round, of honest and of hostile ones: 1 in the plain mean.

    A client without an update in the sum counts as 0.
    """
    lines = (out / AUDIT_FILE).read_text(encoding="utf-8").splitlines()
    clients = [client for line in lines for client in json.loads(line).get("clients", [])]
    means = {}
    for name, of_honest in (("honest weight", True), ("hostile weight", False)):
        weights = [c["weight"] for c in clients if (c["client_id"] in honest) is of_honest]
        means[name] = sum(weights) / len(weights) if weights else 0.0
    return means


def _table(out: Path, name: str) -> list[dict[str, str]]:
    with (RunFolder(out).path / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
