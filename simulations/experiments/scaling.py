"""``flexlora reproduce scaling``: alpha / rank against alpha / sqrt(rank) where ranks differ.

Two tables, in both of which alpha makes the scalings equal at rank 8. One round of one client on
the same rows from the same start at ranks 2 to 64: how far it moves the sum, ``|dW|`` over all
modules. Then ``carried`` with four clients in five at rank 2 under both.
"""

from __future__ import annotations

from flexlora.simulations.experiments.request import ROUNDS
from flexlora.simulations.experiments.variants import SKEW, Variant, fixed

__all__ = ["SCALING"]

PLAIN, RSLORA = "alpha / rank", "alpha / sqrt(rank)"
ALPHA = 16.0
EQUAL_AT = 8
ALONE = {
    "data.partition": "iid",
    "clients.count": 1,
    "fraction-train": 1.0,
    "method.server-learning-rate": 1.0,
    ROUNDS: 1,
}
SCALINGS = {
    PLAIN: {"lora.alpha": ALPHA},
    RSLORA: {"lora.rslora": True, "lora.alpha": ALPHA / EQUAL_AT**0.5},
}
SCALING = (
    *(
        Variant(
            title=f"rank {rank}, {name}",
            kind="norm",
            part="one client's round",
            changes={**ALONE, **fixed(rank), **changes},
        )
        for name, changes in SCALINGS.items()
        for rank in (2, 4, 8, 16, 64)
    ),
    *(
        Variant(
            title=f"carried, {name}",
            kind="loss",
            part="carried, 80 % at rank 2",
            changes={**SKEW, ROUNDS: 4, "eval.max-examples": 8, **changes},
        )
        for name, changes in SCALINGS.items()
    ),
)
