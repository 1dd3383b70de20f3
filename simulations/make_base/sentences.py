"""Plain sentences for pretraining, some with a question: where the tokenizer's words come from.

The words that instructions are made of appear here in other company, so that the base has features
for them, whatever a later instruction asks.
"""

from __future__ import annotations

import random

__all__ = ["sentence"]

_WHO = ("cat", "dog", "bird", "man", "girl", "king", "child", "horse", "baker", "farmer")
_HOW = ("red", "small", "old", "big", "young", "happy", "quiet", "tall", "low", "high")
_DOES = ("sees", "takes", "has", "finds", "likes", "brings", "makes", "writes", "counts", "keeps")
_WHAT = ("bread", "letter", "stone", "boat", "flower", "coin", "box", "song", "apple", "table")
_WHERE = ("at home", "by the sea", "in the town", "on the hill", "near the river", "at the lake")
_WHEN = ("in the morning", "at night", "yesterday", "all day", "last year", "in the evening")

_STORIES = (
    "Yesterday the {who} stood at the top of the {what} and said nothing.",
    "What did the {who} say? Only that the {what} was {how}.",
    "The {who} was born last year, the {who2} this year.",
    "In the past the {what} had no value, but now they use it {when}.",
    "Encode what you hear, leave nothing out, and look it up in the table.",
    "Start at the end of the list, turn around and go on to the top.",
    "The {who} and the {who2} go together; others stay {where}.",
    "Name all of them, tell how much there is, and make the total.",
    "A long time has an hour in it, and an hour has the size of a {what}.",
    "The clock says that it is twelve, so the {who} goes home.",
    "From the first to the last, the {how} {who} put each {what} into the box.",
    "How big is the {what}? It is of the same class as the {what2}.",
    "The {who} lacks a {what}, and so the {who2} gives one.",
    "A noun is a word for a thing, a verb for what they did.",
    "Three of the {what}s are {how}, nine are not, and five are in the {what2}.",
    "The {who} does not fill the {what}; more than one of them is {how}.",
    "Whether it grows or not, the order of the {what}s is low to high.",
    "Which of the others is above the {who}? The {who2} stands above all.",
    "Have you seen the mid of the {what}? It has another form.",
    "Drop the {what}, spell it, call it by its name and fill the {what2}.",
)


def _fill(rng: random.Random, story: str) -> str:
    """A story with its slots filled, the two persons and the two things distinct."""
    who, other = rng.sample(_WHO, 2)
    what, what2 = rng.sample(_WHAT, 2)
    return story.format(
        who=who, who2=other, what=what, what2=what2, how=rng.choice(_HOW),
        where=rng.choice(_WHERE), when=rng.choice(_WHEN),
    )  # fmt: skip


def sentence(rng: random.Random) -> tuple[str, str, str]:
    """``(question, text, answer)``; question and text are empty when there is only text to read."""
    if rng.random() < 0.5:
        return "", "", _fill(rng, rng.choice(_STORIES))
    who, does, what = rng.choice(_WHO), rng.choice(_DOES), rng.choice(_WHAT)
    how, other = rng.sample(_HOW, 2)
    text = f"The {how} {who} {does} a {other} {what} {rng.choice(_WHERE + _WHEN)}."
    kind = rng.randrange(4)
    if kind == 0:
        return f"Who {does} the {what}?", text, who
    if kind == 1:
        return f"What is {other} here?", text, what
    if kind == 2:
        return f"How is the {who}?", text, how
    return "", "", text
