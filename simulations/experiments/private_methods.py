"""Epsilon against loss: ``basis``, ``carried`` and ``ffa-lora`` under central differential privacy.

Cohorts of the default federation stand for 100, 1,000 and 10,000 clients, by scaled noise
(``privacy.as-if-clients``). Every method tries the same learning rates and first clip norms as if
for 1,000 clients at the larger budget, and keeps the best for all of its rows; from there on the
clip follows the median of the clients' norms. The row without noise has the same sampling and
server rate, and no clip.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from flexlora.config.resolve import Config
from flexlora.privacy.accounting import noise_for
from flexlora.simulations.experiments.request import Request
from flexlora.simulations.experiments.variant_table import run_variants
from flexlora.simulations.experiments.variants import SKEW, Variant

__all__ = ["METHODS", "POPULATIONS", "private_methods", "private_variants"]

METHODS = ("basis", "carried", "ffa-lora")
POPULATIONS = (100, 1_000, 10_000)
BUDGETS = (8.0, 2.0)  # epsilon
DELTA = 1e-5
TRIED_AT = 1_000, 8.0
LEARNING_RATES, CLIPS = (5e-3, 2e-2), (4.0, 16.0)
MEASURED = {"eval.split": "test", "eval.max-examples": 12, "eval.every": 0}
SAMPLED = {
    "sampling.policy": "poisson",
    "server.late-rounds": 0,
    "train.max-steps": 10,
    "train.per-device-train-batch-size": 4,
    **SKEW,
}

Scores = Mapping[str, Any]


def private_methods(request: Request) -> int:
    """Try the rates of each method, run its rows and print the table."""
    noise = _noise(request)
    tried = [_variant(method, *TRIED_AT, noise, trials=_trials()) for method in METHODS]
    results = run_variants(request, tried, MEASURED)
    trials = _trials()
    by_method = [
        private_variants(method, noise, results.chosen(first.title) or trials[len(trials) // 2])
        for method, first in zip(METHODS, tried, strict=True)
    ]
    variants = [variant for row in zip(*by_method, strict=True) for variant in row]
    results = run_variants(request, variants, MEASURED)
    request.console.print()
    request.console.print(_table(results.of_seeds(request.seeds), noise))
    request.console.print(f"Numbers: {results.file}", soft_wrap=True)
    return 0


def _noise(request: Request) -> dict[float, float]:
    """The noise multiplier of each budget: at a given share it does not depend on the clients."""
    config = Config.of({**request.default_sizes(), **request.given})
    return {
        budget: noise_for(
            budget,
            DELTA,
            config.num_server_rounds,
            num_clients=max(POPULATIONS),
            sample_share=config.fraction_train,
        )
        for budget in BUDGETS
    }


def _trials() -> tuple[dict[str, object], ...]:
    return tuple(
        {"train.learning-rate": rate, "privacy.clip": clip}
        for clip in CLIPS
        for rate in LEARNING_RATES
    )


def private_variants(
    method: str, noise: Mapping[float, float], chosen: Mapping[str, object]
) -> list[Variant]:
    """The rows of a method with the ``chosen`` trial: at every budget, and without noise."""
    plain = {key: value for key, value in chosen.items() if not key.startswith("privacy.")}
    without = Variant(
        title=_title(method, 0, 0.0), kind="loss", changes={**_shared(method), **plain}
    )
    noisy = (
        _variant(method, population, budget, noise, trials=(dict(chosen),))
        for budget in noise
        for population in POPULATIONS
    )
    return [*noisy, without]


def _shared(method: str) -> dict[str, object]:
    rate = {} if method == "ffa-lora" else {"method.server-learning-rate": 1.0}
    return {"method.name": method, **SAMPLED, **rate}


def _variant(
    method: str,
    population: int,
    budget: float,
    noise: Mapping[float, float],
    trials: tuple[Mapping[str, object], ...],
) -> Variant:
    changes = {
        **_shared(method),
        "privacy.mode": "central",
        "privacy.reproducible": True,
        "privacy.noise-multiplier": noise[budget],
        "privacy.delta": DELTA,
        "privacy.clip-quantile": 0.5,
        "privacy.as-if-clients": population,
    }
    title = _title(method, population, budget)
    return Variant(title=title, kind="loss", changes=changes, trials=trials)


def _title(method: str, population: int, budget: float) -> str:
    return f"{method}, {population:,} clients, epsilon {budget:g}" if budget else f"{method}, none"


def _table(rows: Sequence[Scores], noise: Mapping[float, float]) -> Table:
    """Final loss by population and epsilon, mean and deviation over seeds, a column per method."""
    table = Table(box=None, pad_edge=False, title_justify="left")
    for heading in ("as if clients", "epsilon", "noise multiplier", *METHODS):
        table.add_column(heading, justify="right", no_wrap=True)
    settings = [(0, 0.0), *((n, budget) for n in POPULATIONS for budget in sorted(noise))]
    for population, budget in settings:
        cells = [_cell(rows, _title(method, population, budget)) for method in METHODS]
        of_noise = (f"{population:,}", f"{budget:g}", f"{noise[budget]:.3f}") if budget else None
        table.add_row(*(of_noise or ("", "none", "0")), *cells)
    return table


def _cell(rows: Sequence[Scores], title: str) -> str:
    losses = [row["loss"] for row in rows if row["variant"] == title]
    if not losses:
        return ""
    deviation = f"±{statistics.stdev(losses):.2f}" if len(losses) > 1 else ""
    return f"{statistics.fmean(losses):.2f}{deviation}"
