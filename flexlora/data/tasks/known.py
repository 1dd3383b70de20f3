"""The families of which the embedded base was pretrained on half of the wordings."""

from __future__ import annotations

import random
from functools import partial

from flexlora.data.tasks.family import Instance, family
from flexlora.data.tasks.words import VOWELS, digits, items, word

__all__ = ["KNOWN", "MONTHS", "STATIONS"]

MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")

# An arbitrary table, which a model can only memorise.
STATIONS = {
    "bal": "4", "cor": "9", "dun": "1", "fen": "7", "gil": "3", "hob": "8", "jat": "2", "kes": "6",
    "lom": "5", "mir": "9", "nup": "4", "pod": "7", "rag": "1", "sef": "3", "tiv": "8", "vum": "6",
}  # fmt: skip


known = partial(family, "known")


@known(
    "string",
    "Reverse the word.",
    "Write the word backwards.",
    "Spell the word from the last letter to the first.",
    "Turn the letters around.",
)
def reverse_word(rng: random.Random) -> Instance:
    """``sebo`` to ``obes``."""
    text = word(rng, 3, 6)
    return text, text[::-1]


@known(
    "list",
    "Sort the digits.",
    "Put the digits in order, smallest first.",
    "Order the digits from low to high.",
    "Write the digits so that they grow.",
)
def sort_digits(rng: random.Random) -> Instance:
    """``4172`` to ``1247``."""
    text = digits(rng, 3, 5)
    return text, "".join(sorted(text))


@known(
    "arithmetic",
    "Add the two numbers.",
    "What is the sum?",
    "How much is it together?",
    "Give the total of the numbers.",
)
def add_numbers(rng: random.Random) -> Instance:
    """``34+25`` to ``59``; carries included."""
    left, right = rng.randint(2, 99), rng.randint(2, 99)
    return f"{left}+{right}", str(left + right)


@known(
    "lookup",
    "Give the number of each station.",
    "Look up the stations.",
    "Which numbers do the stations have?",
    "Write the station numbers.",
)
def station_number(rng: random.Random) -> Instance:
    """``bal,cor`` to ``49``: two arbitrary associations, the pair new in each split."""
    chosen = rng.sample(sorted(STATIONS), rng.randint(2, 3))
    return ",".join(chosen), "".join(STATIONS[name] for name in chosen)


def plural_of(noun: str) -> str:
    """Regular spelling: ``-ies`` after consonant and y, ``-es`` after a hiss, else ``-s``."""
    if noun.endswith("y") and noun[-2] not in VOWELS:
        return noun[:-1] + "ies"
    return noun + ("es" if noun[-1] in "sxz" else "s")


@known(
    "grammar",
    "Write the plural.",
    "What are two of them called?",
    "Make the noun plural.",
    "Write the noun for more than one.",
)
def plural(rng: random.Random) -> Instance:
    """``mato`` to ``matos``, ``riby`` to ``ribies``, ``sebox`` to ``seboxes``."""
    noun = word(rng, 3, 5) + rng.choice(["", "", "y", "s", "x"])
    return noun, plural_of(noun)


@known(
    "classification",
    "Is the number odd or even?",
    "Odd or even?",
    "Tell whether the number is even or odd.",
    "Name the parity of the number.",
)
def parity(rng: random.Random) -> Instance:
    """``4173`` to ``odd``."""
    text = digits(rng, 2, 4)
    return text, "odd" if int(text) % 2 else "even"


@known(
    "formatting",
    "Write the date with the month's name.",
    "Format the date: day, month, year.",
    "Write this day as in a letter.",
    "Put the date in the long form.",
)
def date(rng: random.Random) -> Instance:
    """``2021-03-07`` to ``7 Mar 2021``."""
    year, month, day = rng.randint(1950, 2049), rng.randint(1, 12), rng.randint(1, 28)
    return f"{year}-{month:02d}-{day:02d}", f"{day} {MONTHS[month - 1]} {year}"


@known(
    "reasoning",
    "Who is older?",
    "Which of the two has the higher age?",
    "Name the older one.",
    "Who was born first?",
)
def older(rng: random.Random) -> Instance:
    """``mira 45,toma 62`` to ``toma``."""
    first, second = items(rng, 2, 2, 3, 4)
    one, two = rng.sample(range(10, 100), 2)
    return f"{first} {one},{second} {two}", first if one > two else second


KNOWN = (reverse_word, sort_digits, add_numbers, station_number, plural, parity, date, older)
