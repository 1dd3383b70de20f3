"""Read the fields of a reply: their types, the bounds of every number and length, safe words.

What a node says of itself is not trusted. A number beyond its bound, a list too long and a name
that cannot be one are errors; a long cause is cut, since it is for people. Bounds are far above
what real nodes reach, and low enough that nothing sized by them fills a server's memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from flexlora.printable import is_name, printable
from flexlora.wire.jobs import Capability, Score

__all__ = ["LARGEST_LOSS", "check_capability", "check_score", "read_fields"]

LARGEST_LOSS = 100.0  # nats per token: a base that guesses has ln(vocabulary), about 12
LONGEST_TOKEN = 1024  # bytes of text
LARGEST_COUNT = 10**9
BOUNDS: dict[str, tuple[float, float]] = {
    "num_examples": (-LARGEST_COUNT, LARGEST_COUNT),  # check_update names one below 1
    "num_dropped": (0, LARGEST_COUNT),
    "free_bytes": (0, 2**50),
    "out_features": (1, 2**20),
    "in_features": (1, 2**20),
    "base_round": (0, LARGEST_COUNT),
    "steps": (0, LARGEST_COUNT),
    "tokens": (0, 10**12),
    "rows": (0, LARGEST_COUNT),
    "generated": (0, LARGEST_COUNT),
    "choice_rows": (0, LARGEST_COUNT),
    "pattern_rows": (0, LARGEST_COUNT),
    "answer_bytes": (0, 10**13),
    "asked_rank": (0, 2**20),
    "train_seconds": (0, 10**7),
    "train_loss": (0, LARGEST_LOSS),
    "loss_before": (0, LARGEST_LOSS),
    "loss_after": (0, LARGEST_LOSS),
}
MAY_BE_MISSING = ("train_loss", "loss_before", "loss_after")  # NaN is no number
OTHER_NUMBERS = (0, 2**50)
# Characters of words that are cut, and of names, which are not.
WORDS = {"cause": 2000, "note": 1000, "coverage": 2000, "device": 200, "runs": 200, "absent": 500}
WORDS |= {"client_id": 200}  # of a capability: check_capability
NAMES = {"version": 64, "fingerprint": 64, "quantization": 32, "digest": 128, "rank_class": 128}
NAMES |= {"modules": 256}
LONGEST_LISTS = {"modules": 2**17, "out_features": 2**17, "in_features": 2**17}
LONGEST_LIST = 100
LARGEST_MODEL = 2**27  # features of all modules together: Llama 3.1 405B has 39 million


def read_fields(kind: type, record: Mapping) -> dict:
    """The record's values under the dataclass's names and types; lists become tuples.

    Raises:
        TypeError: a value of another type than the field's.
        ValueError: a value beyond the field's bounds.
    """
    types = {field.name: str(field.type) for field in fields(kind)}
    values = {}
    for key, value in record.items():
        name = key.replace("-", "_")
        if name not in types:
            continue
        if isinstance(value, list):
            _check_length(key, name, value)
            value = tuple(value)
        if not _is(types[name], value):
            raise TypeError(f"'{key}' is {_shown(value)}, expected {types[name]}")
        values[name] = _bounded(key, name, value)
    return values


def _check_length(key: str, name: str, value: list) -> None:
    most = LONGEST_LISTS.get(name, LONGEST_LIST)
    if len(value) > most:
        raise ValueError(f"'{key}' has {len(value)} entries, expected at most {most}")


def _bounded(key: str, name: str, value: object) -> object:
    """The value, its words cut and printable."""
    if isinstance(value, tuple):
        return tuple(_bounded(key, name, item) for item in value)
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        if name not in NAMES:
            return printable(value, WORDS.get(name, 200))
        if len(value) > NAMES[name] or not value.isprintable():
            raise ValueError(
                f"'{key}' is {_shown(value)}, expected at most {NAMES[name]} characters that print"
            )
        return value
    assert isinstance(value, int | float)
    low, high = BOUNDS.get(name, OTHER_NUMBERS)
    missing = name in MAY_BE_MISSING and value != value
    if not (missing or low <= value <= high):
        raise ValueError(f"'{key}' is {_shown(value)}, expected {low:g} to {high:g}")
    return value


def _shown(value: object) -> str:
    return printable(repr(value), 80)


def _is(annotation: str, value: object) -> bool:
    if annotation.startswith("tuple["):
        inner = annotation.removeprefix("tuple[").split(",")[0]
        return isinstance(value, tuple) and all(_is(inner, item) for item in value)
    if annotation == "float":
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value).__name__ == annotation


def check_capability(record: Mapping, report: Capability) -> None:
    """Refuse a report that no node could mean; ``record`` is what it was read from.

    Raises:
        ValueError: no name of a client, modules without sizes or with more than any model has, no
            examples and no cause.
    """
    name = str(record.get("client-id"))
    if not is_name(name):
        raise ValueError(
            f"the client's name is '{printable(name, 60)}', expected 1 to 128 characters that print"
        )
    counts = {len(report.modules), len(report.out_features), len(report.in_features)}
    if len(counts) > 1:
        raise ValueError(f"modules and sizes have {sorted(counts)} entries, expected as many")
    if len(set(report.modules)) < len(report.modules):
        raise ValueError("a module is named twice")
    total = sum(report.out_features) + sum(report.in_features)
    if total > LARGEST_MODEL:
        raise ValueError(f"the modules have {total} features together, expected a real model's")
    if not report.cause and (not report.modules or report.num_examples < 1):
        raise ValueError("no modules or no examples, and no cause")


def check_score(name: str, score: Score) -> None:
    """Refuse sums that contradict each other.

    Raises:
        ValueError: a loss per token above ``LARGEST_LOSS``, more text than ``LONGEST_TOKEN`` a
            token, more matches than generated rows, more of these than rows, more rows answered
            right than asked.
    """
    if score.loss > LARGEST_LOSS * score.tokens:
        raise ValueError(
            f"the loss of '{name}' is {score.loss:.6g} over {score.tokens} tokens, expected at "
            f"most {LARGEST_LOSS:g} for each"
        )
    if score.answer_bytes > LONGEST_TOKEN * score.tokens:
        raise ValueError(
            f"'{name}' has {score.answer_bytes} bytes of answers in {score.tokens} tokens, "
            f"expected at most {LONGEST_TOKEN} for each"
        )
    rounded = score.generated * (1.0 + 1e-9)
    if score.generated > score.rows or max(score.exact_match, score.rouge_l) > rounded:
        raise ValueError(
            f"'{name}' has {score.exact_match:g} matches and ROUGE-L {score.rouge_l:g} in "
            f"{score.generated} generated of {score.rows} rows"
        )
    right = max(score.correct, score.correct_norm)
    if score.choice_rows > score.rows or right > score.choice_rows:
        raise ValueError(
            f"'{name}' has {right:g} right of {score.choice_rows} multiple-choice rows among "
            f"{score.rows}"
        )
    if score.pattern_rows > score.generated or score.passed > score.pattern_rows:
        raise ValueError(
            f"'{name}' has {score.passed:g} passed of {score.pattern_rows} answers with a pattern "
            f"among {score.generated} generated"
        )
