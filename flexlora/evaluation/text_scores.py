"""Scores of a generated text against a reference: exact match and ROUGE-L."""

from __future__ import annotations

from functools import cache
from typing import Any

__all__ = ["exact_match", "rouge_l"]


def exact_match(generated: str, reference: str) -> float:
    """1.0 where the two are the same text up to surrounding and repeated white space."""
    return float(generated.split() == reference.split())


def rouge_l(generated: str, reference: str) -> float:
    """ROUGE-L F1 (Lin, 2004) as the ``rouge-score`` package computes it, without stemming."""
    return _scorer().score(reference, generated)["rougeL"].fmeasure


@cache
def _scorer() -> Any:
    """The package loads nltk, so it is imported when the first answer is scored."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)
