"""Scores of a generated text: exact match and ROUGE-L with a reference, and a pattern."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

__all__ = ["exact_match", "passes_pattern", "rouge_l"]


def exact_match(generated: str, reference: str) -> float:
    """1.0 where the two are the same text up to surrounding and repeated white space."""
    return float(generated.split() == reference.split())


def rouge_l(generated: str, reference: str) -> float:
    """ROUGE-L F1 (Lin, 2004) as the ``rouge-score`` package computes it, without stemming."""
    return _scorer().score(reference, generated)["rougeL"].fmeasure


def passes_pattern(generated: str, pattern: str) -> float:
    """1.0 where the regular expression matches anywhere in the text (``re.search``)."""
    return float(re.search(pattern, generated) is not None)


@cache
def _scorer() -> Any:
    """The package loads nltk, so it is imported when the first answer is scored."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)
