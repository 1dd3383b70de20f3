"""Scores of a generated text against a reference: exact match and ROUGE-L.

ROUGE-L is the F1 of the longest common subsequence of words (Lin, "ROUGE: A Package for Automatic
Evaluation of Summaries", 2004). It equals ``rouge-score`` 0.1.2 without stemming, which the tests
compare it with; that package loads nltk, 0.4 s of every run.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["exact_match", "rouge_l"]


def exact_match(generated: str, reference: str) -> float:
    """1.0 where the two are the same text up to surrounding and repeated white space."""
    return float(generated.split() == reference.split())


def rouge_l(generated: str, reference: str) -> float:
    """ROUGE-L F1 over lower-case words of a-z and 0-9; 0.0 where either has none."""
    found, wanted = _words(generated), _words(reference)
    common = _longest_common_subsequence(found, wanted)
    if common == 0:
        return 0.0
    precision, recall = common / len(found), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _longest_common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    """Its length, in O(len(left) * len(right)) time and O(len(right)) memory."""
    above = [0] * (len(right) + 1)
    for word in left:
        row = [0]
        for j, other in enumerate(right):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        above = row
    return above[-1]
