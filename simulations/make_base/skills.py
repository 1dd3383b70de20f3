"""Generic skills for pretraining: what the held-out families will recombine, and none of them.

Each skill draws ``(instruction, input, answer)``. They give the base its features: copying, letter
classes, positions, digit maps, lists, comparisons, maps defined in the prompt.
"""

from __future__ import annotations

import random

from flexlora.data.tasks.words import CONSONANTS, LETTERS, VOWELS, digits, items, letters, word

__all__ = ["SKILLS"]

Example = tuple[str, str, str]

_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_ORDER = ("first", "second", "third", "fourth")


def _text(rng: random.Random) -> str:
    """Pseudo-words mostly; sometimes letters or digits, so that a skill is not tied to spelling."""
    draw = rng.random()
    if draw < 0.6:
        return word(rng, 3, 6)
    return letters(rng, 2, 5) if draw < 0.85 else digits(rng, 2, 5)


def copy(rng: random.Random) -> Example:
    say = rng.choice(["Copy this.", "Say it again.", "Write the same.", "Repeat the text."])
    kind = rng.randrange(3)
    text = _text(rng) if kind else ",".join(items(rng, 2, 4))
    if rng.random() < 0.25:
        return say.replace(".", " twice."), text, text + text
    return say, text, text


def letter_at(rng: random.Random) -> Example:
    text = _text(rng)
    while len(text) < 4:
        text = _text(rng)
    place = rng.randrange(5)
    which = [*_ORDER, "last"][place]
    say = rng.choice(["Give the {} letter.", "Which letter is {}?", "Write the {} sign."])
    return say.format(which), text, text[-1 if place == 4 else place]


def part(rng: random.Random) -> Example:
    text, count = _text(rng) + rng.choice(LETTERS), rng.choice([1, 2])
    number = ["one letter", "two letters"][count - 1]
    kind = rng.randrange(4)
    if kind == 0:
        return f"Keep the first {number}.", text, text[:count]
    if kind == 1:
        return f"Keep the last {number}.", text, text[-count:]
    if kind == 2:
        return f"Cut the first {number}.", text, text[count:]
    return f"Cut the last {number}.", text, text[:-count]


def remove_letter(rng: random.Random) -> Example:
    text = word(rng, 4, 7)
    letter = rng.choice(text)
    kept = text.replace(letter, "") or "-"
    return rng.choice(["Remove every {}.", "Take away the letter {}."]).format(letter), text, kept


def change_letter(rng: random.Random) -> Example:
    text = _text(rng)
    old, new = rng.choice(text), rng.choice(LETTERS)
    say = rng.choice(["Change {} to {}.", "Write {} as {}."])
    return say.format(old, new), text, text.replace(old, new)


def map_in_prompt(rng: random.Random) -> Example:
    keys = rng.sample(LETTERS, rng.randint(2, 4))
    values = rng.sample(LETTERS, len(keys))
    table = ",".join(f"{key}={value}" for key, value in zip(keys, values, strict=True))
    text = "".join(rng.choice(keys) for _ in range(rng.randint(2, 4)))
    mapped = "".join(values[keys.index(letter)] for letter in text)
    return "Use the table.", f"{table};{text}", mapped


def mark_vowels(rng: random.Random) -> Example:
    text, sign = word(rng, 3, 6), rng.choice("*-+")
    if rng.random() < 0.5:
        marked = "".join(sign if letter in VOWELS else letter for letter in text)
        return f"Put {sign} for each vowel.", text, marked
    marked = "".join(letter if letter in VOWELS else sign for letter in text)
    return f"Put {sign} for each consonant.", text, marked


def vowel_or_not(rng: random.Random) -> Example:
    text = letters(rng, 1, 5)
    answer = "".join("v" if letter in VOWELS else "c" for letter in text)
    return rng.choice(["Mark vowels v and consonants c.", "Vowel or consonant?"]), text, answer


def count_vowels(rng: random.Random) -> Example:
    text = word(rng, 3, 7)
    vowels = sum(letter in VOWELS for letter in text)
    if rng.random() < 0.5:
        return "How many vowels are there?", text, str(vowels)
    return "Count the consonants.", text, str(len(text) - vowels)


def count_signs(rng: random.Random) -> Example:
    if rng.random() < 0.5:
        text = _text(rng)
        return rng.choice(["How many letters?", "Count the letters."]), text, str(len(text))
    listed = items(rng, 2, 5)
    return rng.choice(["How many items?", "Count the items."]), ",".join(listed), str(len(listed))


def capitals(rng: random.Random) -> Example:
    text = word(rng, 3, 6)
    kind = rng.randrange(3)
    if kind == 0:
        return rng.choice(["Write it in capitals.", "Use big letters."]), text, text.upper()
    if kind == 1:
        return rng.choice(["Write it in small letters.", "No capitals."]), text.upper(), text
    return rng.choice(["Begin with a capital.", "Write it as a name."]), text, text.capitalize()


def between(rng: random.Random) -> Example:
    text, sign = _text(rng), rng.choice("-.:/*+")
    kind = rng.randrange(4)
    if kind == 0:
        return f"Put {sign} between the letters.", text, sign.join(text)
    if kind == 1:
        return f"Put {sign} at the end.", text, text + sign
    if kind == 2:
        return f"Put {sign} before it.", text, sign + text
    listed = items(rng, 2, 4)
    return f"Put {sign} between the items.", ",".join(listed), sign.join(listed)


def ending(rng: random.Random) -> Example:
    text, extra = word(rng, 3, 6), rng.choice(["ing", "er", "ly", "ness", "en", word(rng, 2, 3)])
    if rng.random() < 0.7:
        say = rng.choice(["Add {} to the word.", "End the word in {}.", "Write it with {}."])
        return say.format(extra), text, text + extra
    return f"Take {extra} off the word.", text + extra, text


def item_at(rng: random.Random) -> Example:
    listed = items(rng, 3, 4)
    place = rng.randrange(4)
    which = [*_ORDER[:3], "last"][place]
    say = rng.choice(["Give the {} item.", "Which item is {}?"])
    return say.format(which), ",".join(listed), listed[-1 if place == 3 else place]


def list_part(rng: random.Random) -> Example:
    listed = items(rng, 3, 4)
    kind = rng.randrange(5)
    if kind == 0:
        return "Turn the list around.", ",".join(listed), ",".join(listed[::-1])
    if kind == 1:
        return "Leave the last item away.", ",".join(listed), ",".join(listed[:-1])
    if kind == 2:
        return "Write the items after the first.", ",".join(listed), ",".join(listed[1:])
    if kind == 3:
        return "Add the first item again.", ",".join(listed), ",".join([*listed, listed[0]])
    swapped = [listed[1], listed[0], *listed[2:]]
    return "Swap the first two items.", ",".join(listed), ",".join(swapped)


def first_letters(rng: random.Random) -> Example:
    listed = items(rng, 2, 4)
    which, place = rng.choice([("first", 0), ("last", -1)])
    taken = "".join(item[place] for item in listed)
    return f"Take the {which} letter of each item.", ",".join(listed), taken


def number_name(rng: random.Random) -> Example:
    value = rng.randrange(10)
    if rng.random() < 0.5:
        return "Write the number as a word.", str(value), _NAMES[value]
    return "Write the number as a digit.", _NAMES[value], str(value)


def digit_map(rng: random.Random) -> Example:
    """The first digit is one that no step maps to its nines' complement: no chance answer leaks."""
    text = rng.choice("123678") + "".join(
        rng.choice("0123456789") for _ in range(rng.randint(1, 4))
    )
    step, name = rng.choice([(1, "one up"), (-1, "one down"), (2, "two up"), (-2, "two down")])
    return f"Move each digit {name}.", text, "".join(str((int(x) + step) % 10) for x in text)


def small_sums(rng: random.Random) -> Example:
    one, two = rng.randrange(10), rng.randrange(10)
    if rng.random() < 0.5:
        return rng.choice(["Plus.", "What do they make?"]), f"{one} {two}", str(one + two)
    one, two = max(one, two), min(one, two)
    return rng.choice(["Minus.", "What is the difference?"]), f"{one} {two}", str(one - two)


def hour_sums(rng: random.Random) -> Example:
    value = rng.randint(12, 40)
    if rng.random() < 0.5:
        return "Take twelve away.", str(value), str(value - 12)
    return "Take ten away.", str(value), str(value - 10)


def leading_zero(rng: random.Random) -> Example:
    value, width = rng.randint(0, 99), rng.choice([2, 3])
    if rng.random() < 0.5:
        return "Drop zeros in front.", f"{value:0{width}d}", str(value)
    return f"Write {_NAMES[width]} digits.", str(value), f"{value:0{width}d}"


def around_colon(rng: random.Random) -> Example:
    left, right = digits(rng, 1, 2), digits(rng, 2, 2)
    sign = rng.choice(":>-/")
    kind = rng.randrange(3)
    if kind == 0:
        return f"What stands before {sign}?", f"{left}{sign}{right}", left
    if kind == 1:
        return f"What stands after {sign}?", f"{left}{sign}{right}", right
    return f"Swap the sides of {sign}.", f"{left}{sign}{right}", f"{right}{sign}{left}"


def name_around(rng: random.Random) -> Example:
    left, right = items(rng, 2, 2)
    sign = rng.choice(":>-/")
    if rng.random() < 0.5:
        return f"Who stands left of {sign}?", f"{left}{sign}{right}", left
    return f"Who stands right of {sign}?", f"{left}{sign}{right}", right


def compare(rng: random.Random) -> Example:
    one, two = rng.sample(range(100), 2)
    kind = rng.randrange(4)
    if kind == 0:
        return "Which number is greater?", f"{one} {two}", str(max(one, two))
    if kind == 1:
        return "Which number is smaller?", f"{one} {two}", str(min(one, two))
    sign = rng.choice(["below", "above"])
    yes = one < two if sign == "below" else one > two
    return f"Is it {sign} {two}?", str(one), "yes" if yes else "no"


def contains(rng: random.Random) -> Example:
    text = _text(rng)
    letter = rng.choice(text) if rng.random() < 0.5 else rng.choice(LETTERS)
    if rng.random() < 0.5:
        return f"Is there {letter} in it?", text, "yes" if letter in text else "no"
    return f"Does it start with {letter}?", text, "yes" if text[0] == letter else "no"


def ends_with(rng: random.Random) -> Example:
    text = word(rng, 2, 5) + rng.choice(VOWELS if rng.random() < 0.5 else CONSONANTS)
    if rng.random() < 0.5:
        return "Does it end in a vowel?", text, "yes" if text[-1] in VOWELS else "no"
    letter = text[-1] if rng.random() < 0.5 else rng.choice(LETTERS)
    return f"Does it end in {letter}?", text, "yes" if text[-1] == letter else "no"


def shift_code(rng: random.Random) -> Example:
    step, name = rng.choice([(1, "hill"), (-1, "lake")])
    text = letters(rng, 1, 4)
    coded = "".join(LETTERS[(LETTERS.index(letter) + step) % 26] for letter in text)
    return f"Read the {name} code.", text, coded


def appears(rng: random.Random) -> Example:
    one, two = items(rng, 2, 2)
    listed = [one, one, two]
    rng.shuffle(listed)
    if rng.random() < 0.5:
        return "Which item is there twice?", ",".join(listed), one
    return "Which item is there once?", ",".join(listed), two


SKILLS = (
    (copy, 3), (letter_at, 2), (part, 3), (remove_letter, 3), (change_letter, 2),
    (map_in_prompt, 3), (mark_vowels, 2), (vowel_or_not, 2), (count_vowels, 1), (count_signs, 1),
    (capitals, 3), (between, 3), (ending, 3), (item_at, 2), (list_part, 4), (first_letters, 1),
    (number_name, 1), (digit_map, 3), (small_sums, 1), (hour_sums, 1), (leading_zero, 2),
    (around_colon, 2), (name_around, 1), (compare, 2), (contains, 1), (ends_with, 1),
    (shift_code, 2), (appears, 1),
)  # fmt: skip
