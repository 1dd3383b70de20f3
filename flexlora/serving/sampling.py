"""The next token of every row of a step, drawn independently of the other rows.

Token i of a request with seed s is the quantile ``u(s, i)`` of its distribution, with u a hash of
both: no generator is shared and none is advanced, so the same request with the same seed gets the
same tokens in any batch. Top-p keeps the smallest set of likeliest tokens whose probability is at
least p (Holtzman et al., arXiv 1904.09751).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexlora.seeds import derive_seed
from flexlora.serving.requests import Sampling, TokenLogprob

__all__ = ["Draw", "logprobs_of", "next_tokens"]

FEW = 256  # likeliest tokens that are sorted first; a row whose top-p needs more is sorted whole


@dataclass(frozen=True, kw_only=True)
class Draw:
    """How one row's token is drawn: the ``index``-th of a request with ``seed``."""

    sampling: Sampling
    seed: int
    index: int

    @property
    def quantile(self) -> float:
        """In [0, 1)."""
        return derive_seed(self.seed, "token", self.index) / 2**63


def next_tokens(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """One token id for each row of ``logits [rows, vocabulary]``; -1 where a logit is NaN."""
    largest, tokens = logits.max(dim=-1)
    random = [i for i, draw in enumerate(draws) if draw.sampling.temperature > 0]
    whole = [i for i in random if draws[i].sampling.top_p == 1.0]
    nucleus = [i for i in random if draws[i].sampling.top_p < 1.0]
    for rows, drawn in ((whole, _drawn), (nucleus, _drawn_from_top)):
        if rows:
            chosen = [draws[i] for i in rows]
            index = torch.tensor(rows, device=logits.device)
            tokens[index] = drawn(_probabilities(logits[index], chosen), chosen)
    return tokens.masked_fill_(~torch.isfinite(largest), -1).tolist()


def _probabilities(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Softmax at each row's temperature, float64: rounding must not move a quantile."""
    temperatures = logits.new_tensor([d.sampling.temperature for d in draws], dtype=torch.float64)
    return (logits.double() / temperatures[:, None]).softmax(dim=-1)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return like.new_tensor(values)[:, None]


def _drawn(probabilities: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The quantile in the order of the vocabulary."""
    sums = probabilities.cumsum(dim=-1)
    aim = _column([d.quantile for d in draws], sums) * sums[:, -1:]
    return torch.searchsorted(sums, aim, right=True).clamp_(max=sums.shape[1] - 1).flatten()


def _drawn_from_top(probabilities: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The quantile among the likeliest tokens that reach top-p, the likeliest first."""
    few = min(FEW, probabilities.shape[1])
    values, tokens = probabilities.topk(few, dim=-1)
    limits = _column([d.sampling.top_p for d in draws], values)
    found = _from_sorted(values, tokens, limits, draws)
    short = (values.sum(dim=-1) < limits[:, 0]).nonzero().flatten().tolist()
    for i in short:
        whole, order = probabilities[i : i + 1].sort(dim=-1, descending=True)
        found[i] = _from_sorted(whole, order, limits[i : i + 1], draws[i : i + 1])[0]
    return found


def _from_sorted(values: Tensor, tokens: Tensor, limits: Tensor, draws: Sequence[Draw]) -> Tensor:
    sums = values.cumsum(dim=-1)
    last = torch.searchsorted(sums, limits).clamp_(max=sums.shape[1] - 1)
    aim = _column([d.quantile for d in draws], sums) * sums.gather(1, last)
    place = torch.searchsorted(sums, aim, right=True)
    return tokens.gather(1, torch.minimum(place, last)).flatten()


def logprobs_of(
    logits: Tensor, tokens: Sequence[int], counts: Sequence[int | None]
) -> list[TokenLogprob | None]:
    """Log-probabilities of each row's token and of its ``counts[row]`` likeliest; None: none."""
    found: list[TokenLogprob | None] = [None] * len(tokens)
    rows = [i for i, count in enumerate(counts) if count is not None]
    if not rows:
        return found
    index = torch.tensor(rows, device=logits.device)
    logs = logits[index].float().log_softmax(dim=-1)
    chosen = logs.gather(1, torch.tensor([[tokens[i]] for i in rows], device=logits.device))
    top = logs.topk(max(1, max(counts[i] or 0 for i in rows)), dim=-1)
    columns = (chosen.flatten().tolist(), top.values.tolist(), top.indices.tolist())
    for i, logprob, values, ids in zip(rows, *columns, strict=True):
        pairs = tuple(zip(ids, values, strict=True))[: counts[i] or 0]
        found[i] = TokenLogprob(token_id=tokens[i], logprob=logprob, top=pairs)
    return found
