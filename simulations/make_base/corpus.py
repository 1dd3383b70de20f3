"""The text on which the embedded base is pretrained: generated here, nothing comes from outside.

Three parts: (1) generic skills, instructions about letters, words, lists and numbers that belong to
no task family; (2) the known families, in half of their wordings and on train instances only;
(3) plain sentences, some with a question. Held-out families are not imported: they cannot leak.
A document is ``(prompt, answer)`` in the chat template of the base's tokenizer, without bos.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from flexlora.data.tasks.family import split_of
from flexlora.data.tasks.known import KNOWN
from flexlora.simulations.make_base.sentences import sentence
from flexlora.simulations.make_base.skills import SKILLS

__all__ = ["documents", "plain_prompt"]

KNOWN_SHARE = 0.14
SENTENCE_SHARE = 0.08


def plain_prompt(instruction: str, text: str) -> str:
    """An instruction row up to the answer; equal to the tokenizer's template (a test compares)."""
    lines = [line for line in (instruction, text) if line]
    return "\n".join([*lines, "Answer: "])


def known_instance(rng: random.Random) -> tuple[str, str]:
    """One train instance of a known family, in a wording that pretraining may use."""
    family = rng.choice(KNOWN)
    while True:
        text, answer = family.generate(rng)
        if split_of(family.name, text) == "train":
            return plain_prompt(rng.choice(family.pretrained_paraphrases), text), answer


def documents(seed: int) -> Iterator[tuple[str, str]]:
    """An endless stream of ``(prompt, answer)``; the same seed gives the same stream."""
    rng = random.Random(seed)
    skills = [skill for skill, weight in SKILLS for _ in range(weight)]
    while True:
        draw = rng.random()
        if draw < KNOWN_SHARE:
            yield known_instance(rng)
        elif draw < KNOWN_SHARE + SENTENCE_SHARE:
            question, text, answer = sentence(rng)
            yield (plain_prompt(question, text) if question else ""), answer
        else:
            instruction, text, answer = rng.choice(skills)(rng)
            yield plain_prompt(instruction, text), answer
