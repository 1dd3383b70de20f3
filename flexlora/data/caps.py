"""The most train rows of a simulated client: ``population.examples``.

    ""                      no limit
    "100"                   at most 100
    "lognormal:60:1.0"      at most N, with log N ~ N(log 60, 1.0)

The number and the choice of rows are functions of the seed and the client id.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from flexlora.data.rows import Row
from flexlora.errors import UserError
from flexlora.seeds import numpy_generator

__all__ = ["capped_rows", "num_rows", "parse_examples"]


def num_rows(law: tuple[float, float] | None, client_id: str, available: int, *, seed: int) -> int:
    """How many of its ``available`` train rows a client has: at least 1 if there is one."""
    if law is None:
        return available
    median, sigma = law
    drawn = numpy_generator(seed, "rows", client_id).normal(math.log(median), sigma)
    return min(available, max(1, round(math.exp(min(drawn, 40.0)))))


def capped_rows(
    clients: Mapping[str, Mapping[str, list[Row]]], text: str, *, seed: int
) -> dict[str, dict[str, list[Row]]]:
    """The clients with their train rows limited, in the original order; other splits unchanged.

    Raises:
        UserError: a law that cannot be read.
    """
    law = parse_examples(text)
    if law is None:
        return {client_id: dict(splits) for client_id, splits in clients.items()}
    capped = {}
    for client_id, splits in clients.items():
        rows = splits.get("train", [])
        count = num_rows(law, client_id, len(rows), seed=seed)
        generator = numpy_generator(seed, "which rows", client_id)
        chosen = sorted(generator.permutation(len(rows))[:count].tolist())
        capped[client_id] = {**splits, "train": [rows[i] for i in chosen]}
    return capped


def parse_examples(text: str) -> tuple[float, float] | None:
    """``population.examples`` as median and sigma; a plain number has no spread.

    Raises:
        UserError: neither a whole number of at least 1 nor a lognormal law.
    """
    if not text.strip():
        return None
    kind, *numbers = (part.strip() for part in text.split(":"))
    try:
        if kind == "lognormal" and len(numbers) == 2:
            median, sigma = map(float, numbers)
        else:
            median, sigma = float(int(text)), 0.0
        if 1.0 <= median < math.inf and 0.0 <= sigma < math.inf:
            return median, sigma
    except ValueError:
        pass
    raise UserError(
        f"population.examples is '{text}', expected a number of rows of at least 1, as '100', or "
        "'lognormal:MEDIAN:SIGMA' with a sigma of at least 0, as 'lognormal:60:1.0'."
    )
