"""Run a variant: a federation, the untrained base, or each client alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

from flexlora.aggregation.engine.state import GlobalChange, State
from flexlora.clients.worker import Worker, worker_for
from flexlora.config.resolve import Config
from flexlora.lora.adapters import Adapter
from flexlora.lora.ranks import RankClass
from flexlora.runs.folder import RunFolder
from flexlora.server.settings import check_config, factoring_of, rank_policy_of
from flexlora.server.strategy import FlexLoRAStrategy
from flexlora.simulations.experiments.hostile_runs import hostile_run
from flexlora.simulations.experiments.tail_energy import TailObserver
from flexlora.simulations.scoring import held_out_scores
from flexlora.simulations.simulate import simulate
from flexlora.training.slots import SlotModel
from flexlora.wire.jobs import TrainJob

__all__ = ["RUNNERS", "Runner"]

Runner = Callable[[Config, Path], Mapping[str, object]]


def _federated(config: Config, out: Path) -> dict[str, float]:
    """Exact match per rank class, and the mean over clients at the rank of their class."""
    strategy = simulate(config, out, overwrite=True)
    rounds = RunFolder(out).metrics()
    last = rounds[-1]
    scores = {name: last[f"eval_exact_match/{name}"] for name in strategy.roster.rank_classes}
    return {
        **scores,
        "all clients": last["eval_exact_match"],
        "loss": last["eval_loss"],
        "MB down": sum(row.get("bytes_down", 0) for row in rounds) / 1e6,
        "MB up": sum(row.get("bytes_up", 0) for row in rounds) / 1e6,
    }


def _base(config: Config, out: Path) -> dict[str, float]:
    score = held_out_scores(worker_for(config), {})["base"]
    return {"all clients": score.exact_match / score.generated}


def _alone(config: Config, out: Path) -> dict[str, float]:
    """Every client trains alone, at its rank, for as many steps as all rounds together have.

    Scored on the test rows of all clients, as the other variants are, and averaged over clients.
    """
    check_config(config)
    worker = worker_for(config)
    classes = rank_policy_of(config).assign(worker.client_ids)
    by_class: dict[str, list[float]] = {}
    for client_id, adapter in _train_alone(worker, config, classes).items():
        score = held_out_scores(worker, {client_id: adapter})[client_id]
        value = score.exact_match / score.generated
        by_class.setdefault(classes[client_id].name, []).append(value)
    scores = {name: statistics.fmean(values) for name, values in by_class.items()}
    return {**scores, "all clients": statistics.fmean(v for vs in by_class.values() for v in vs)}


def _train_alone(
    worker: Worker, config: Config, classes: Mapping[str, RankClass]
) -> dict[str, Adapter]:
    strategy = FlexLoRAStrategy(config)
    slots: SlotModel = worker.slots
    state = State(round=0, change=GlobalChange.zero(slots.shapes))
    key = "train.max-steps" if worker.config.train.max_steps else "train.num-train-epochs"
    longer = config.num_server_rounds * worker.config.flat()[key]
    config = worker.config.with_values({key: longer})
    alone = worker_for(config)
    jobs = [
        TrainJob(
            client_id=client_id,
            server_round=1,
            num_server_rounds=1,
            start=strategy.method.start(state, rank_class, factoring_of(config)).sealed(),
        )
        for client_id, rank_class in sorted(
            classes.items(), key=lambda item: (item[1].rank, item[0])
        )
    ]
    size = config.engine.cohort_size or 8
    results = [r for at in range(0, len(jobs), size) for r in alone.train(jobs[at : at + size])]
    return {r.client_id: r.adapter for r in results if r.adapter is not None}


def _tail(config: Config, out: Path) -> dict[str, object]:
    """The tail metrics of ``G`` by round, and the last eval loss."""
    observer = TailObserver(out)
    simulate(config, out, observer=observer, overwrite=True)
    return {"loss": RunFolder(out).metrics()[-1]["eval_loss"], "rounds": observer.rounds}


def _loss(config: Config, out: Path) -> dict[str, float]:
    """The last eval loss, each client at its rank; no answer is generated."""
    simulate(config.with_values({"eval.generate": "never"}), out, overwrite=True)
    return {"loss": RunFolder(out).metrics()[-1]["eval_loss"]}


def _norm(config: Config, out: Path) -> dict[str, float]:
    """``|G|_F`` over all modules after the run."""
    strategy = simulate(config.with_values({"eval.generate": "never"}), out, overwrite=True)
    squares = (float(svd.S.double().square().sum()) for svd in strategy.state.change.values())
    return {"|dW|": sum(squares) ** 0.5}


def _course(config: Config, out: Path) -> dict[str, object]:
    """The eval loss and the server's rate by round."""
    simulate(config, out, overwrite=True)
    rounds = [
        {
            "round": row["round"],
            "loss": row["eval_loss"],
            "rate": row.get("server_learning_rate"),
        }
        for row in RunFolder(out).metrics()
        if row["round"] > 0
    ]
    return {"loss": rounds[-1]["loss"], "rounds": rounds}


RUNNERS: dict[str, Runner] = {
    "federated": _federated,
    "base": _base,
    "alone": _alone,
    "tail": _tail,
    "loss": _loss,
    "norm": _norm,
    "course": _course,
    "hostile": hostile_run,
}
