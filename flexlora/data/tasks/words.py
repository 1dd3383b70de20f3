"""Inputs of the generated tasks: pseudo-words and item lists, drawn from a ``random.Random``.

Pseudo-words follow English spelling loosely, so that rules (a plural, a past tense) apply, and are
far too many to be memorised.
"""

from __future__ import annotations

import random

__all__ = ["CONSONANTS", "LETTERS", "VOWELS", "digits", "items", "letters", "word"]

VOWELS = "aeiou"
CONSONANTS = "bcdfghjklmnpqrstvwxyz"
LETTERS = "abcdefghijklmnopqrstuvwxyz"

# Weights lean towards letters that English starts syllables with; rare letters stay possible.
_ONSETS = "bbcddffgghjkkllmmnnpprrssttvwz"


def word(rng: random.Random, shortest: int = 3, longest: int = 6) -> str:
    """Alternating consonants and vowels, ``shortest`` to ``longest`` letters."""
    length = rng.randint(shortest, longest)
    vowel_next = rng.random() < 0.15
    out = []
    for _ in range(length):
        out.append(rng.choice(VOWELS if vowel_next else _ONSETS))
        vowel_next = not vowel_next if rng.random() < 0.9 else vowel_next
    return "".join(out)


def letters(rng: random.Random, shortest: int, longest: int) -> str:
    """Uniform letters, without spelling regularities."""
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(shortest, longest)))


def digits(rng: random.Random, shortest: int, longest: int) -> str:
    """A digit string whose first digit is not zero."""
    length = rng.randint(shortest, longest)
    return str(rng.randint(10 ** (length - 1), 10**length - 1))


def items(rng: random.Random, fewest: int, most: int, shortest: int = 2, longest: int = 3) -> list:
    """Distinct short pseudo-words."""
    wanted = rng.randint(fewest, most)
    words: list[str] = []
    while len(words) < wanted:
        candidate = word(rng, shortest, longest)
        if candidate not in words:
            words.append(candidate)
    return words
