"""How often the bound on a share of a round's weight touches honest clients of unequal sizes.

    python -m flexlora.simulations.benchmarks.weight_shares

Sizes are drawn as ``population.examples=lognormal:60:SIGMA`` draws them. Of 2,000 rounds each: the
share of rounds in which a client is cut, and the weight that moves to others in a mean round.
"""

from __future__ import annotations

import argparse

import numpy as np

from flexlora.aggregation.engine.weight_cap import largest_share, weight_level

__all__ = ["touched"]


def touched(sigma: float, clients: int, rounds: int, seed: int = 0) -> tuple[float, float]:
    """The share of rounds that are cut, and the mean total variation of the weights' shares."""
    generator = np.random.default_rng([seed, clients, round(1000 * sigma)])
    cut = moved = 0.0
    for _ in range(rounds):
        sizes = np.maximum(1, np.round(60 * np.exp(sigma * generator.standard_normal(clients))))
        after = np.minimum(sizes, weight_level(sizes.tolist()))
        cut += bool((after < sizes).any())
        moved += float(np.abs(after / after.sum() - sizes / sizes.sum()).sum()) / 2
    return cut / rounds, moved / rounds


def main() -> None:
    parser = argparse.ArgumentParser(description="Honest clients beyond their largest share.")
    parser.add_argument("--rounds", type=int, default=2000)
    rounds = parser.parse_args().rounds
    print("| clients a round | largest share | sigma 0.5 | sigma 1 | sigma 1.5 |")
    print("|---:|---:|---:|---:|---:|")
    for clients in (2, 4, 8, 24, 100, 1000):
        found = (touched(sigma, clients, rounds) for sigma in (0.5, 1.0, 1.5))
        cells = " | ".join(f"{100 * cut:.0f} %, {100 * moved:.1f} %" for cut, moved in found)
        print(f"| {clients} | {largest_share(clients):.2f} | {cells} |")


if __name__ == "__main__":
    main()
