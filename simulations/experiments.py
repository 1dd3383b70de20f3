"""``flexlora reproduce NAME``: named experiments that print their table and keep their numbers.

An experiment is a list of arms, each the default configuration with a few keys changed. The arms of
a seed share the data, the base, the rows they are scored on and the number of local steps.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flexlora.clients.worker import Worker, worker_for
from flexlora.server.settings import ServerSettings
from flexlora.server.strategy import FlexLoRAStrategy
from flexlora.simulations.figures import arms_figure
from flexlora.simulations.results import KeptResults
from flexlora.simulations.simulate import simulate
from flexlora.simulations.terminal import make_console
from rich.console import Console
from rich.table import Table

from flexlora.adapters import Adapter
from flexlora.aggregation.base import State
from flexlora.aggregation.state import GlobalChange
from flexlora.config import Config, resolved
from flexlora.errors import UserError, nearest
from flexlora.jobs import EvalJob, Score, TrainJob
from flexlora.ranks import RankClass
from flexlora.slots import SlotModel

__all__ = ["EXPERIMENTS", "Arm", "reproduce"]

MEASURED = {"eval.split": "test", "eval.max-examples": 0, "eval.every": 0, "eval.generate": "ends"}


TRIED = {"eval.split": "validation", "eval.every": 0, "eval.generate": "never", "seed": 1000}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One row of the table: a title, and what differs from the default configuration.

    Of its ``trials`` the one with the lowest validation loss after half of the rounds, on a seed of
    its own, is run on the seeds of the table.
    """

    title: str
    changes: Mapping[str, object] = field(default_factory=dict)
    kind: str = "federated"
    trials: tuple[Mapping[str, object], ...] = ({},)


def fixed(rank: int, **changes: object) -> dict[str, object]:
    return {"method.name": "flexlora", "ranks.policy": "fixed", "ranks.fixed": rank, **changes}


POOLED = {"data.partition": "iid", "clients.count": 1, "fraction-train": 1.0}

# Four clients in five are weak: which part of the gap between everybody weak and everybody strong
# does a method close?
SKEW = {"ranks.tiers": "2,8,16", "ranks.shares": "0.8,0.1,0.1"}
# As many trials for each: a method with a server rate tries three of them, the others three
# learning rates of their clients.
RATES = tuple({"method.server-learning-rate": rate} for rate in (1.0, 2.0, 3.0))
STEPS = tuple({"train.learning-rate": rate} for rate in (5e-3, 1e-2, 2e-2))
# The same for a pretrained base, which wants smaller steps: six trials each.
GENTLE_RATES = tuple(
    {"train.learning-rate": rate, "method.server-learning-rate": server}
    for rate in (1e-3, 2e-3, 5e-3)
    for server in (1.0, 2.0)
)
GENTLE_STEPS = tuple({"train.learning-rate": rate} for rate in (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2))


def skewed(
    title: str, method: str, trials: tuple[Mapping[str, object], ...], **changes: object
) -> Arm:
    return Arm(title=title, changes={"method.name": method, **SKEW, **changes}, trials=trials)


def fixed_rank(rank: int) -> dict[str, object]:
    return {"ranks.policy": "fixed", "ranks.fixed": rank}


def method_arms(
    rates: tuple[Mapping[str, object], ...], steps: tuple[Mapping[str, object], ...]
) -> tuple[Arm, ...]:
    """Every method, with as many trials for each."""
    return (
        Arm(title="the base, untrained", kind="base"),
        skewed("everybody at rank 2", "residual", rates, **fixed_rank(2)),
        skewed("everybody at rank 16", "residual", rates, **fixed_rank(16)),
        skewed("zero-padded averaging (fedit)", "fedit", steps),
        skewed("hetlora", "hetlora", steps),
        skewed("rbla", "rbla", steps),
        skewed("ffa-lora", "ffa-lora", steps),
        skewed("rolora", "rolora", steps),
        skewed("slora", "slora", steps),
        skewed("fed-plora", "fed-plora", steps),
        skewed("fedex-lora", "fedex-lora", rates),
        skewed("flora", "flora", rates),
        skewed("florist", "florist", rates),
        skewed("FlexLoRA as published", "flexlora", steps),
        skewed("raflora", "raflora", steps),
        skewed("residual", "residual", rates),
        skewed("aligned", "aligned", rates),
        skewed("aligned, three batches", "aligned", rates, **{"method.gradient-batches": 3}),
        skewed("aligned, random start", "aligned", rates, **{"method.gradient-batches": 0}),
        skewed(
            "aligned, carried 16 in bfloat16",
            "aligned",
            rates,
            **{"method.carried-rank": 16, "method.carried-dtype": "bfloat16"},
        ),
        skewed("aligned, one restart", "aligned", rates, **{"method.restarts": 1}),
        skewed("carried", "carried", rates),
    )


EXPERIMENTS: dict[str, tuple[Arm, ...]] = {
    "first-look": (
        Arm(title="the base, untrained", kind="base"),
        Arm(title="each client alone", kind="alone"),
        Arm(title="zero-padded averaging", changes={"method.name": "fedit"}),
        Arm(title="FlexLoRA as published", changes={"method.name": "flexlora"}),
        Arm(
            title="residual form",
            changes={"method.name": "residual", "method.server-learning-rate": 1.0},
        ),
        Arm(
            title="residual form, server rate 2",
            changes={"method.name": "residual", "method.server-learning-rate": 2.0},
        ),
        Arm(
            title="aligned, server rate 2",
            changes={"method.name": "aligned", "method.server-learning-rate": 2.0},
        ),
        Arm(
            title="the same, random start",
            changes={
                "method.name": "aligned",
                "method.server-learning-rate": 2.0,
                "method.gradient-batches": 0,
            },
        ),
        Arm(title="everybody at rank 2", changes=fixed(2)),
        Arm(title="everybody at rank 16", changes=fixed(16)),
        Arm(
            title="pooled data, same rows",
            changes=fixed(16, **POOLED, **{"train.per-device-train-batch-size": 64}),
        ),
        Arm(title="pooled data, same steps", changes=fixed(16, **POOLED)),
    ),
    "methods": method_arms(RATES, STEPS),
    "methods-gently": method_arms(GENTLE_RATES, GENTLE_STEPS),
}


def reproduce(
    name: str, *, seeds: int, out: Path, sets: Sequence[str] = (), first_seed: int = 0
) -> int:
    """Run every arm for every seed, print mean and deviation, keep ``results.json`` in ``out``.

    Arms that are already in ``results.json`` are not run again.

    Raises:
        UserError: an unknown experiment, no seeds, or ``sets`` that cannot be.
    """
    if name not in EXPERIMENTS:
        known = ", ".join(EXPERIMENTS)
        hint = nearest(name, EXPERIMENTS)
        raise UserError(f"experiment '{name}' is unknown, expected {known}.{hint}")
    if seeds < 1:
        raise UserError(f"--seeds is {seeds}, expected at least 1.")
    given, console = Config.given(sets=tuple(sets)), make_console()
    arms = EXPERIMENTS[name]
    owned = {key for arm in arms for key in arm.changes} | {"seed", "eval.generate"}
    if taken := sorted(owned & set(given)):
        raise UserError(f"{taken[0]} is set by the experiment '{name}' itself; leave it out.")
    kept = KeptResults.read(out / "results.json", name, given)
    for arm in arms:
        _try_out(arm, given, kept, out, console)
    for seed in range(first_seed, first_seed + seeds):
        for arm in arms:
            if kept.has(arm.title, seed):
                continue
            best = kept.chosen(arm.title)
            changes = {**MEASURED, **given, **arm.changes, **best, "seed": seed}
            scores = _RUNNERS[arm.kind](
                resolved(Config(changes)), out / "runs" / f"{_slug(arm.title)}-{seed}"
            )
            kept.add(arm.title, seed, scores)
            spelled = ", ".join(f"{key} {value:.3f}" for key, value in scores.items())
            console.print(f"seed {seed}, {arm.title}: {spelled}", soft_wrap=True)
    tuned = any(len(arm.trials) > 1 for arm in arms)
    rows = with_gap_closed(kept.rows) if tuned else kept.rows
    titles = [arm.title for arm in arms]
    console.print()
    console.print(summary_table(titles, rows))
    figure = out / f"{name}.svg"
    label = "exact match on test rows, each client at its own rank (dots: seeds)"
    drawn = arms_figure(titles, rows, key="all clients", label=label, file=figure)
    hint = f"Figure: {figure}" if drawn else "No figure: pip install 'flexlora[figures]'."
    console.print(f"Numbers: {kept.file}. {hint}", soft_wrap=True)
    return 0


def _try_out(arm: Arm, given: Mapping, kept: KeptResults, out: Path, console: Console) -> None:
    """Run the trials of an arm that has a choice, and keep what each came to."""
    if len(arm.trials) < 2 or kept.chosen(arm.title):
        return
    losses = []
    for index, trial in enumerate(arm.trials):
        config = Config({**given, **arm.changes, **trial, **TRIED})
        rounds = max(1, config["num-server-rounds"] // 2)
        config = resolved(Config({**config, "num-server-rounds": rounds}))
        strategy = simulate(config, out / "trials" / f"{_slug(arm.title)}-{index}", overwrite=True)
        losses.append(strategy.run.metrics()[-1]["eval_loss"])
    kept.choose(arm.title, arm.trials, losses)
    spelled = ", ".join(f"{loss:.3f}" for loss in losses)
    console.print(f"{arm.title}: {kept.chosen(arm.title)} of {spelled}", soft_wrap=True)


WEAK, STRONG = "everybody at rank 2", "everybody at rank 16"


def with_gap_closed(rows: Sequence[Mapping]) -> list[dict]:
    """Each row with the part of the gap in loss between all weak and all strong that it closes."""
    ends = {(row["arm"], row["seed"]): row["loss"] for row in rows if row["arm"] in (WEAK, STRONG)}
    result = []
    for row in rows:
        weak, strong = ends.get((WEAK, row["seed"])), ends.get((STRONG, row["seed"]))
        result.append(dict(row))
        if "loss" in row and weak is not None and strong is not None and weak != strong:
            result[-1]["gap closed"] = (weak - row["loss"]) / (weak - strong)
    return result


def summary_table(titles: Sequence[str], rows: Sequence[Mapping]) -> Table:
    """Mean and standard deviation over seeds of every score, one row per arm.

    Scores by rank class are left out where the arms differ in their classes and the table is
    about the gap.
    """
    keys = _columns(rows)
    table = Table(box=None, pad_edge=False, title_justify="left")
    table.add_column("exact match on test rows", no_wrap=True)
    for key in keys:
        table.add_column(key, justify="right", no_wrap=True)
    for title in titles:
        own = [row for row in rows if row["arm"] == title]
        table.add_row(title, *(_cell(key, [r[key] for r in own if key in r]) for key in keys))
    return table


def _columns(rows: Sequence[Mapping]) -> list[str]:
    columns = dict.fromkeys(key for row in rows for key in row if key not in ("arm", "seed"))
    classes = sorted((k for k in columns if k.startswith("rank_")), key=lambda k: int(k[5:]))
    others = [key for key in columns if not key.startswith("rank_")]
    return others if "gap closed" in columns else [*classes, *others]


def _cell(key: str, values: Sequence[float]) -> str:
    """``mean±deviation``; megabytes without, since they hardly differ between seeds."""
    if not values:
        return ""
    mean = statistics.fmean(values)
    if key.startswith("MB"):
        return f"{mean:.0f}" if mean >= 20 else f"{mean:.1f}"
    digits = 3 if key == "loss" else 2
    deviation = f"±{statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{deviation}"


def _slug(title: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in title.lower()).split())


def _federated(config: Config, out: Path) -> dict[str, float]:
    """Exact match per rank class, and the mean over clients at their own class's rank."""
    strategy = simulate(config, out, overwrite=True)
    rounds = strategy.run.metrics()
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
    worker = worker_for(config)
    jobs = [
        EvalJob(client_id=client_id, server_round=0, adapters={}, generate=True)
        for client_id in worker.client_ids
    ]
    total = sum((r.scores["base"] for r in worker.evaluate(jobs) if r.scores), Score())
    if not total.generated:
        raise UserError("the data has no test rows to score on; give it a test split.")
    return {"all clients": total.exact_match / total.generated}


def _alone(config: Config, out: Path) -> dict[str, float]:
    """Every client trains by itself for as many steps as all rounds together have, at its own rank.

    Scored on the test rows of all clients, as the other arms are, and averaged over clients.
    """
    worker, settings = worker_for(config), ServerSettings.from_config(config)
    classes = settings.rank_policy.assign(worker.client_ids)
    trained = _train_alone(worker, settings, classes)
    by_class: dict[str, list[float]] = {}
    for client_id, adapter in trained.items():
        job = {"own": adapter}
        jobs = [
            EvalJob(client_id=other, server_round=1, adapters=job, generate=True)
            for other in worker.client_ids
        ]
        total = sum((r.scores["own"] for r in worker.evaluate(jobs) if r.scores), Score())
        value = total.exact_match / total.generated
        by_class.setdefault(classes[client_id].name, []).append(value)
    scores = {name: statistics.fmean(values) for name, values in by_class.items()}
    return {**scores, "all clients": statistics.fmean(v for vs in by_class.values() for v in vs)}


def _train_alone(
    worker: Worker, settings: ServerSettings, classes: Mapping[str, RankClass]
) -> dict[str, Adapter]:
    strategy = FlexLoRAStrategy(settings)
    slots: SlotModel = worker.slots
    state = State(round=0, change=GlobalChange.zero(slots.shapes))
    key = "train.max-steps" if worker.config["train.max-steps"] else "train.num-train-epochs"
    longer = settings.num_server_rounds * worker.config[key]
    config = Config({**worker.config, key: longer})
    alone = worker_for(config)
    jobs = [
        TrainJob(
            client_id=client_id,
            server_round=1,
            num_server_rounds=1,
            start=strategy.method.start(state, rank_class, settings.factoring).sealed(),
        )
        for client_id, rank_class in sorted(
            classes.items(), key=lambda item: (item[1].rank, item[0])
        )
    ]
    size = config["engine.cohort-size"] or 8
    results = [r for at in range(0, len(jobs), size) for r in alone.train(jobs[at : at + size])]
    return {r.client_id: r.adapter for r in results if r.adapter is not None}


_RUNNERS: dict[str, Callable[[Config, Path], dict[str, float]]] = {
    "federated": _federated,
    "base": _base,
    "alone": _alone,
}
