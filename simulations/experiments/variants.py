"""Variants: the rows of an experiment's table, as changes of the default configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = [
    "FIRST_LOOK",
    "METHODS",
    "METHODS_GENTLY",
    "RATES",
    "SKEW",
    "STEPS",
    "Variant",
    "fixed",
]

Changes = Mapping[str, object]
WEAK, STRONG = "weak", "strong"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of the table: a title and changes of the default configuration.

    Of its ``trials`` the one with the lowest validation loss after half of the rounds, on a
    separate seed, is run on the seeds of the table; below scale 0.5 the middle one is run.

    Args:
        part: the table of the variant, where an experiment prints several.
        end: ``weak`` or ``strong`` for the two ends of the gap.
    """

    title: str
    changes: Changes = field(default_factory=dict)
    kind: str = "federated"
    trials: tuple[Changes, ...] = ({},)
    part: str = ""
    end: str = ""


def fixed(rank: int, **changes: object) -> dict[str, object]:
    """All clients at one rank."""
    return {"ranks.policy": "fixed", "ranks.fixed": rank, **changes}


# Four clients in five train at the weakest rank.
SKEW: Changes = {"ranks.tiers": "2,8,16", "ranks.shares": "0.8,0.1,0.1"}
# Three trials each: of the server rate where the method has one, else of the learning rate.
RATES = tuple({"method.server-learning-rate": rate} for rate in (1.0, 2.0, 3.0))
STEPS = tuple({"train.learning-rate": rate} for rate in (5e-3, 1e-2, 2e-2))
B_ALONE = tuple({"train.learning-rate": rate} for rate in (1e-2, 2e-2, 4e-2))
# Six trials each with smaller steps, for a pretrained base.
GENTLE_RATES = tuple(
    {"train.learning-rate": rate, "method.server-learning-rate": server}
    for rate in (1e-3, 2e-3, 5e-3)
    for server in (1.0, 2.0)
)
GENTLE_STEPS = tuple({"train.learning-rate": rate} for rate in (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2))
POOLED: Changes = {"data.partition": "iid", "clients.count": 1, "fraction-train": 1.0}


def method_variants(
    rates: tuple[Changes, ...], steps: tuple[Changes, ...], b_alone: tuple[Changes, ...]
) -> tuple[Variant, ...]:
    """One variant per method, the base and both ends of the gap.

    ``b_alone``: the trials of ``basis``, whose ``lora_B`` starts at zero in every round.
    """

    def skewed(
        title: str,
        method: str,
        trials: tuple[Changes, ...],
        changes: Changes | None = None,
        end: str = "",
    ) -> Variant:
        changes = {"method.name": method, **SKEW, **(changes or {})}
        return Variant(title=title, changes=changes, trials=trials, end=end)

    return (
        Variant(title="the base, untrained", kind="base"),
        skewed("everybody at rank 2", "residual", rates, fixed(2), WEAK),
        skewed("everybody at rank 16", "residual", rates, fixed(16), STRONG),
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
        skewed("aligned, three batches", "aligned", rates, {"method.gradient-batches": 3}),
        skewed("aligned, random start", "aligned", rates, {"method.gradient-batches": 0}),
        skewed(
            "aligned, carried 16 in bfloat16",
            "aligned",
            rates,
            {"method.carried-rank": 16, "method.carried-dtype": "bfloat16"},
        ),
        skewed("carried", "carried", rates),
        skewed("basis", "basis", b_alone),
    )


METHODS = method_variants(RATES, STEPS, B_ALONE)
METHODS_GENTLY = method_variants(GENTLE_RATES, GENTLE_STEPS, GENTLE_STEPS)

TWICE = {"method.server-learning-rate": 2.0}
FIRST_LOOK = (
    Variant(title="the base, untrained", kind="base"),
    Variant(title="each client alone", kind="alone"),
    Variant(title="zero-padded averaging", changes={"method.name": "fedit"}),
    Variant(title="FlexLoRA as published", changes={"method.name": "flexlora"}),
    Variant(
        title="residual form",
        changes={"method.name": "residual", "method.server-learning-rate": 1.0},
    ),
    Variant(title="residual form, server rate 2", changes={"method.name": "residual", **TWICE}),
    Variant(title="aligned, server rate 2", changes={"method.name": "aligned", **TWICE}),
    Variant(
        title="the same, random start",
        changes={"method.name": "aligned", **TWICE, "method.gradient-batches": 0},
    ),
    Variant(title="everybody at rank 2", changes={"method.name": "flexlora", **fixed(2)}),
    Variant(title="everybody at rank 16", changes={"method.name": "flexlora", **fixed(16)}),
    Variant(
        title="pooled data, same rows",
        changes={
            "method.name": "flexlora",
            **fixed(16),
            **POOLED,
            "train.per-device-train-batch-size": 64,
        },
    ),
    Variant(
        title="pooled data, same steps", changes={"method.name": "flexlora", **fixed(16), **POOLED}
    ),
)
