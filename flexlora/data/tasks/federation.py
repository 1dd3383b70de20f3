"""The default federation: clients with one to three families each, in unequal amounts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from flexlora.data.tasks.family import Family, draw_rows
from flexlora.errors import UserError
from flexlora.seeds import numpy_generator

if TYPE_CHECKING:
    from flexlora.data.rows import Row

__all__ = ["deal_families", "federate"]

FEWEST_TRAIN_ROWS, MOST_TRAIN_ROWS = 100, 400
# Mostly two or three families: with one a client can learn to ignore the instruction. The shares
# were not chosen by an ablation.
HAND_SIZES, HAND_SHARES = (1, 2, 3), (1 / 6, 2 / 6, 3 / 6)
# Above the uniform Dirichlet (1): mixtures are uneven, but few families get only a few rows.
MIXTURE_CONCENTRATION = 3.0


def deal_families(
    names: Sequence[str], num_clients: int, generator: np.random.Generator
) -> list[list[str]]:
    """One to three distinct families for each client, dealt from reshuffled decks of all of them.

    So the counts of two families differ by at most one deck, and with enough clients (a third of
    the families if all draw three) every family has a client.
    """
    deck: list[str] = []
    hands: list[list[str]] = []
    for _ in range(num_clients):
        hand: list[str] = []
        for _ in range(int(generator.choice(HAND_SIZES, p=HAND_SHARES))):
            if not deck:
                deck = [str(name) for name in generator.permutation(list(names))]
            # After a reshuffle the next family may already be in the hand.
            card = next((name for name in deck if name not in hand), deck[0])
            deck.remove(card)
            hand.append(card)
        hands.append(sorted(set(hand)))
    return hands


def _shares(count: int, weights: np.ndarray) -> list[int]:
    """Whole numbers near ``count * weights`` that add up to ``count``, none below one."""
    edges = np.rint(np.cumsum(weights) * (count - len(weights))).astype(int)
    return [int(share) + 1 for share in np.diff(edges, prepend=0)]


def federate(families: Sequence[Family], *, num_clients: int, seed: int) -> dict[str, list[Row]]:
    """Rows by split, each with its ``client`` (``client_00`` ...), ``task`` and ``category``.

    A client's train rows number 100 to 400 (log-uniform); it has a twentieth of that for validation
    and a tenth for test, in the same mixture of families.

    Raises:
        UserError: ``num_clients`` is below 1.
    """
    if num_clients < 1:
        raise UserError(f"The built-in tasks need at least 1 client, {num_clients} were asked for.")
    by_name = {family.name: family for family in families}
    generator = numpy_generator(seed, "federation")
    hands = deal_families(list(by_name), num_clients, generator)
    width = max(2, len(str(num_clients - 1)))
    rows: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    for index, hand in enumerate(hands):
        client = f"client_{index:0{width}d}"
        size = math.exp(generator.uniform(math.log(FEWEST_TRAIN_ROWS), math.log(MOST_TRAIN_ROWS)))
        weights = generator.dirichlet([MIXTURE_CONCENTRATION] * len(hand))
        for split, fraction in (("train", 1.0), ("validation", 1 / 20), ("test", 1 / 10)):
            counts = _shares(max(len(hand), round(size * fraction)), weights)
            for name, count in zip(hand, counts, strict=True):
                rows[split] += draw_rows(
                    by_name[name], split=split, count=count, seed=seed, client=client
                )
    return rows
