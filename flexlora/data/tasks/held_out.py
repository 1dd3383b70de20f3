"""The families that are not in the pretraining data, for federated tuning to learn.

They combine skills of the base (copying, letters, positions) under new rules. ``river_code``
permutes the alphabet: as a change of a copying model's letters it is a map of rank 25, so it needs
far more LoRA rank than the other rules.
"""

from __future__ import annotations

import random
from functools import partial

from flexlora.data.tasks.family import Instance, family
from flexlora.data.tasks.words import LETTERS, VOWELS, items, letters, word

__all__ = ["HELD_OUT", "RIVER_CODE"]

# A fixed permutation of the alphabet that moves every letter.
RIVER_CODE = dict(zip(LETTERS, "qhwnzkpbtxfrgjcmevyidoulsa", strict=True))


held_out = partial(family, "held-out")


@held_out(
    "string",
    "Leave out the vowels.",
    "Write only the consonants.",
    "Drop a, e, i, o and u.",
    "Keep what is not a vowel.",
)
def drop_vowels(rng: random.Random) -> Instance:
    """``sebota`` to ``sbt``."""
    while True:
        text = word(rng, 4, 7)
        consonants = "".join(letter for letter in text if letter not in VOWELS)
        if consonants and consonants != text:
            return text, consonants


@held_out(
    "list",
    "Move the first item to the end.",
    "Start the list at the second item.",
    "Put the first item last.",
    "Turn the list by one.",
)
def rotate_list(rng: random.Random) -> Instance:
    """``ma,ri,se`` to ``ri,se,ma``."""
    listed = items(rng, 3, 4, 2, 2)
    return ",".join(listed), ",".join([*listed[1:], listed[0]])


@held_out(
    "arithmetic",
    "Take each digit from nine.",
    "Fill each digit up to nine.",
    "What does each digit lack to nine?",
    "Write nine minus each digit.",
)
def nines(rng: random.Random) -> Instance:
    """``4072`` to ``5927``: each digit taken from nine."""
    text = "".join(rng.choice("0123456789") for _ in range(rng.randint(3, 5)))
    return text, "".join(str(9 - int(digit)) for digit in text)


@held_out(
    "lookup",
    "Write it in the river code.",
    "Encode the letters with the river code.",
    "What is this in the river code?",
    "Use the river code.",
)
def river_code(rng: random.Random) -> Instance:
    """Each letter by its arbitrary partner in ``RIVER_CODE``."""
    text = letters(rng, 3, 4)
    return text, "".join(RIVER_CODE[letter] for letter in text)


def past_of(verb: str) -> str:
    """Regular spelling: ``-ied`` after consonant and y, ``-d`` after e, else ``-ed``."""
    if verb.endswith("y") and verb[-2] not in VOWELS:
        return verb[:-1] + "ied"
    return verb + ("d" if verb[-1] == "e" else "ed")


@held_out(
    "grammar",
    "Write the past tense.",
    "What did they do yesterday?",
    "Put the verb in the past.",
    "Say it as of last year.",
)
def past_tense(rng: random.Random) -> Instance:
    """``lomat`` to ``lomated``, ``riby`` to ``ribied``, ``sare`` to ``sared``."""
    verb = word(rng, 3, 5) + rng.choice(["", "", "y", "e"])
    return verb, past_of(verb)


@held_out(
    "classification",
    "Is the value low, mid or high?",
    "Name the size class.",
    "How big is the value?",
    "Sort the value into its class.",
)
def size_class(rng: random.Random) -> Instance:
    """``4180`` to ``mid``: below 3000 low, below 6000 mid, else high."""
    number = rng.randint(0, 8999)
    return f"{number:04d}", ("low", "mid", "high")[number // 3000]


@held_out(
    "formatting",
    "Write the time with am or pm.",
    "What does the twelve hour clock say?",
    "Format the time for the morning and evening.",
    "Change the time to twelve hours.",
)
def clock(rng: random.Random) -> Instance:
    """``19:45`` to ``7:45 pm``."""
    hour, minute = rng.randint(0, 23), rng.randint(0, 59)
    return f"{hour:02d}:{minute:02d}", f"{hour % 12 or 12}:{minute:02d} {'ap'[hour // 12]}m"


@held_out(
    "reasoning",
    "Who is the tallest?",
    "Who stands above all others?",
    "Name the one at the top.",
    "Which of the three is the biggest?",
)
def tallest(rng: random.Random) -> Instance:
    """``rik>to,ma>rik`` to ``ma``: two facts in either order, the answer is on no right side."""
    top, middle, bottom = items(rng, 3, 3, 2, 3)
    facts = [f"{top}>{middle}", f"{middle}>{bottom}"]
    rng.shuffle(facts)
    return ",".join(facts), top


HELD_OUT = (drop_vowels, rotate_list, nines, river_code, past_tense, size_class, clock, tallest)
