"""How far the norms of honest updates lie from their median: what the bound must let through.

    flexlora simulate --out runs/a; python -m flexlora.simulations.benchmarks.update_norms runs/a

Of every run the largest norm over the lower median, by kind of norm: of the updates of its own
round, and of the rounds before; then the largest over the smallest of one round, which is what two
clients alone can come to. The checkpoint of a run remembers the last five rounds.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from statistics import median_low

from flexlora.aggregation.engine.norm_bound import NAMES, NormHistory, Norms
from flexlora.runs.folder import RunFolder

__all__ = ["ratios"]


def ratios(history: NormHistory, name: str) -> tuple[float, float, float]:
    """Over the median of the own round, over that of earlier rounds, and over the smallest."""
    own = earlier = spread = 0.0
    before: list[float] = []
    for server_round in sorted(history.rounds):
        norms = _positive(history.rounds[server_round], name)
        if not norms:
            continue
        own = max(own, max(norms) / median_low(norms))
        spread = max(spread, max(norms) / min(norms))
        if before:
            earlier = max(earlier, max(norms) / median_low(before))
        before += norms
    return own, earlier, spread


def _positive(accepted: Sequence[Norms], name: str) -> list[float]:
    return [math.sqrt(value) for norms in accepted if (value := getattr(norms, name)) > 0.0]


def main() -> None:
    parser = argparse.ArgumentParser(description="Norms of a run's updates over their median.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder")
    for run in parser.parse_args().runs:
        history = NormHistory.from_dict(RunFolder(run).load_notes().get("norms", {}))
        count = sum(map(len, history.rounds.values()))
        cells = ("/".join(f"{ratio:.1f}" for ratio in ratios(history, name)) for name in NAMES)
        figures = ", ".join(f"{name} {cell}" for name, cell in zip(NAMES, cells, strict=True))
        print(f"{run}: {count} updates; {figures}")


if __name__ == "__main__":
    main()
