"""Slow references for evaluation: likelihoods of choices, the paired bootstrap."""

import random

import torch

import reference


def log_likelihood(model, adapters, prompt, answer):
    """``sum log p(answer_t | prompt, answer_<t)``, the whole row through a merged model."""
    ids = (*prompt, *answer)
    logits = reference.logits_of(model, adapters, ids).double()
    log_p = torch.log_softmax(logits, dim=-1)
    return sum(float(log_p[len(prompt) + i - 1, token]) for i, token in enumerate(answer))


def best(values):
    """The index of the first largest value."""
    return max(range(len(values)), key=lambda i: (values[i], -i))


def bootstrap_interval(pairs, *, resamples, level, seed=0):
    """Percentile interval of ``sum a / sum w - sum b / sum v`` over rows ``(a, w, b, v)``."""
    draw, found = random.Random(seed), []
    for _ in range(resamples):
        rows = [draw.choice(pairs) for _ in pairs]
        a, w, b, v = (sum(column) for column in zip(*rows, strict=True))
        found.append(a / w - b / v)
    found.sort()
    tail = (1 - level) / 2
    return found[round(tail * (resamples - 1))], found[round((1 - tail) * (resamples - 1))]
