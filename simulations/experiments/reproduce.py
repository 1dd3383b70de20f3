"""``flexlora reproduce NAME``: named experiments with their expected figures and a verdict.

Each writes its results to ``results.json`` after every run, so that an interrupted one resumes.
``--scale`` is a factor on clients, rounds and seeds. Expected figures are those of scale 1; a
smaller run judges only those that hold at any scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flexlora.config.resolve import Config
from flexlora.errors import UserError, nearest
from flexlora.report.console import make_console
from flexlora.simulations.experiments.flexlora_1613 import flexlora_1613
from flexlora.simulations.experiments.heavy_tail import heavy_tail
from flexlora.simulations.experiments.hostile_clients import hostile_clients
from flexlora.simulations.experiments.private_methods import private_methods
from flexlora.simulations.experiments.rank_collapse import rank_collapse
from flexlora.simulations.experiments.request import SEEDS, Request
from flexlora.simulations.experiments.scaling import SCALING
from flexlora.simulations.experiments.server_rates import server_rates
from flexlora.simulations.experiments.variant_table import run_table
from flexlora.simulations.experiments.variants import FIRST_LOOK, METHODS, METHODS_GENTLY, Variant

__all__ = ["EXPERIMENTS", "Experiment", "list_experiments", "reproduce", "table_of"]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One entry of ``flexlora reproduce``; ``run`` returns the exit status.

    ``minutes``: at scale 1 on two cores.
    """

    about: str
    expected: str
    minutes: int
    run: Callable[[Request], int]


def table_of(variants: Sequence[Variant]) -> Callable[[Request], int]:
    """An experiment that prints a table and judges nothing."""

    def run(request: Request) -> int:
        run_table(request, variants)
        return 0

    return run


TABLE = "a table, no verdict"
EXPERIMENTS: dict[str, Experiment] = {
    "first-look": Experiment(
        about="the default federation: each client alone, six ways together, pooled data",
        expected=TABLE,
        minutes=30,
        run=table_of(FIRST_LOOK),
    ),
    "methods": Experiment(
        about="every method at ranks 2/8/16 for 80/10/10 % of the clients, three trials each",
        expected=TABLE,
        minutes=75,
        run=table_of(METHODS),
    ),
    "methods-gently": Experiment(
        about="the same with the smaller steps that a pretrained base wants, six trials each",
        expected=TABLE,
        minutes=100,
        run=table_of(METHODS_GENTLY),
    ),
    "rates": Experiment(
        about="server rate 1, 2 and the round's own, from one client to 80, IID and by task",
        expected=TABLE,
        minutes=75,
        run=server_rates,
    ),
    "scaling": Experiment(
        about="alpha / rank and rsLoRA: how far a round at each rank moves the sum; loss",
        expected=TABLE,
        minutes=5,
        run=table_of(SCALING),
    ),
    "rank-collapse": Experiment(
        about="what is left of the tail of G: the published form, the residual one, carried",
        expected="kept of the tail a round: the law of untrained rounds or 1, to 0.2",
        minutes=12,
        run=rank_collapse,
    ),
    "heavy-tail": Experiment(
        about="the gap between everybody weak and strong that a method closes, two distributions",
        expected="carried > aligned, 0 > fedex-lora, residual > flexlora > fedit; aligned > -0.25",
        minutes=60,
        run=heavy_tail,
    ),
    "hostile": Experiment(
        about="eight attacks by two clients in ten against every robust rule, a backdoor's life",
        expected="loss within 5 % of that without attack for one rule at least",
        minutes=60,
        run=hostile_clients,
    ),
    "private-methods": Experiment(
        about="epsilon against loss of basis, carried, ffa-lora as if for 100 to 10,000 clients",
        expected=TABLE,
        minutes=30,
        run=private_methods,
    ),
    "flexlora-1613": Experiment(
        about="1,613 clients, 80 a round, the paper's ranks; needs --set data.path=DIR",
        expected="no client lost, loss falls by 1.5, memory grows by 10 % at most",
        minutes=30,
        run=flexlora_1613,
    ),
}


def reproduce(
    name: str,
    *,
    out: Path,
    seeds: int | None = None,
    sets: Sequence[str] = (),
    first_seed: int = 0,
    scale: float = 1.0,
) -> int:
    """Run one experiment into ``out``: 0, or 1 where an expected figure does not hold.

    Variants that are already in ``results.json`` are not run again.

    Raises:
        UserError: an unknown experiment, no seeds, a scale or ``sets`` that cannot be.
    """
    if name not in EXPERIMENTS:
        known = ", ".join(EXPERIMENTS)
        hint = nearest(name, EXPERIMENTS)
        raise UserError(f"experiment '{name}' is unknown, expected {known}.{hint}")
    request = Request(
        name=name,
        out=out,
        console=make_console(),
        given=Config.given(sets=tuple(sets)),
        num_seeds=seeds,
        first_seed=first_seed,
        scale=scale,
    )
    return EXPERIMENTS[name].run(request)


def list_experiments() -> int:
    """Print each experiment with its minutes and expected figures."""
    console = make_console()
    console.print("name            minutes  what it measures; what is expected", style="bold")
    for name, experiment in EXPERIMENTS.items():
        text = f"{name:<14}  {experiment.minutes:>7}  {experiment.about}"
        console.print(text, soft_wrap=True)
        console.print(f"{'':<25}expected: {experiment.expected}", style="dim", soft_wrap=True)
    text = f"Minutes are those of two cores at --scale 1 with {SEEDS} seeds."
    console.print(f"\n{text} `flexlora reproduce NAME --scale 0.2` is a smaller one.")
    return 0
