"""Whether a model can be served: a trial of packed requests against the model's plain forward.

The trial goes every way that a token can take (whole prompts side by side, a later part of a
prompt, decoding) with two prompts of unequal length. A model that carries a state from token to
token (Mamba, RWKV), positions outside the attention (ALiBi) or attention outside transformers'
interface gives other logits, and is refused in one sentence instead of being served wrongly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flexlora.errors import UserError, one_line
from flexlora.serving.attention_plan import Span, plan_attention
from flexlora.serving.kv_cache import KVCache, LayerShape, Pool, Slot
from flexlora.serving.model_pass import ModelPass, Part
from flexlora.training.base_model import BaseModel, text_config
from flexlora.training.trial_pass import usual_tokens

__all__ = ["length_limit", "plain_logits", "trial_layers"]

PROMPTS = ((0, 6), (6, 9))  # of 9 usual tokens
KINDS = {"full_attention", "sliding_attention"}
GROWING = ("dynamic", "longrope")  # rotary angles that depend on the longest row of the batch
UNKNOWN_LENGTH = 4096
# Of the largest logit. The families that can be served are all below 1e-6 in float32.
EXACT, ROUNDED = 3e-5, 5e-2


def length_limit(base: BaseModel) -> int:
    """The longest prompt and answer together for which rows of a batch are independent."""
    config = text_config(base.model.config)
    longest = base.max_positions or UNKNOWN_LENGTH
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, Mapping))]
    for kind in kinds:
        if kind.get("rope_type") in GROWING:
            longest = min(longest, kind.get("original_max_position_embeddings") or longest)
    return int(longest)


@torch.no_grad()
def plain_logits(base: BaseModel) -> list[Tensor]:
    """Logits ``[length, vocabulary]`` of each trial prompt alone, before the model is changed.

    Raises:
        UserError: the model cannot run.
    """
    try:
        return [
            base.model(input_ids=ids[None], use_cache=False).logits[0].float()
            for ids in _prompts(base)
        ]
    except Exception as error:  # whatever the model's code raises
        raise _refused(base, one_line(error)) from error


def _prompts(base: BaseModel) -> list[Tensor]:
    tokens = usual_tokens(base.model, PROMPTS[-1][1]).to(base.device)
    return [tokens[start:stop] for start, stop in PROMPTS]


def trial_layers(
    base: BaseModel, passing: ModelPass, expected: Sequence[Tensor]
) -> dict[int, LayerShape]:
    """The shapes of each layer's keys and values, after the trial.

    Raises:
        UserError: the model cannot be served.
    """
    try:
        layers = _layers(base, passing, expected)
        found = _in_steps(base, passing, layers)
    except UserError:
        raise
    except Exception as error:  # whatever the model's code raises
        raise _refused(base, one_line(error)) from error
    _check_same(base, found, [logits[-1] for logits in expected])
    return layers


def _refused(base: BaseModel, cause: str) -> UserError:
    kind = getattr(base.model.config, "model_type", type(base.model).__name__)
    return UserError(
        f"model type '{kind}' cannot be served ({cause}); expected a decoder whose attention goes "
        "through transformers' attention interface, such as llama, qwen or gemma."
    )


def _layers(
    base: BaseModel, passing: ModelPass, expected: Sequence[Tensor]
) -> dict[int, LayerShape]:
    """One pass of both prompts without a cache: logits at every position, and what layers give."""
    nowhere = Pool({}, 1, base.device)
    parts, spans, at = [], [], 0
    for ids in _prompts(base):
        slot = Slot(nowhere, 0)
        parts.append(Part(tokens=ids.tolist(), slot=slot, version=None))
        spans.append(Span(start=at, count=len(ids), past=0, slot=slot))
        at += len(ids)
    step = plan_attention(spans, base.device)
    step.seen = {}
    passing.plan_base()
    logits = passing.forward(parts, spans, step, list(range(at))).float()
    _check_same(base, list(logits), [row for prompt in expected for row in prompt])
    _check_windows(base, step.seen)
    layers = {}
    for index, given in step.seen.items():
        key, value = given["key"], given["value"]
        layers[index] = LayerShape(
            heads=key.shape[1],
            key_width=key.shape[3],
            value_width=value.shape[3],
            dtype=key.dtype,
        )
    return layers


def _check_windows(base: BaseModel, seen: Mapping[int, Mapping[str, Any]]) -> None:
    """Refuse attention that is limited by a mask alone: three tokens would not show it."""
    config = text_config(base.model.config)
    if len(seen) != config.num_hidden_layers:
        raise _refused(base, f"{len(seen)} of {config.num_hidden_layers} layers have attention")
    window = getattr(config, "sliding_window", None)
    window = window if getattr(config, "use_sliding_window", True) else None
    plain = "sliding_attention" if window else "full_attention"
    kinds = getattr(config, "layer_types", None) or [plain] * len(seen)
    for index, kind in enumerate(kinds):
        if kind not in KINDS:
            raise _refused(base, f"its layer {index} is '{kind}'")
        if kind == "sliding_attention" and seen[index]["window"] is None:
            raise _refused(base, f"its layer {index} does not name its window")


def _in_steps(base: BaseModel, passing: ModelPass, layers: dict[int, LayerShape]) -> list[Tensor]:
    """The last logits of each prompt, computed as in service."""
    first, second = (ids.tolist() for ids in _prompts(base))
    length = PROMPTS[-1][1]
    cache = KVCache(layers, max_length=length, max_bytes=2**40, device=base.device)
    slots = [slot for _ in PROMPTS if (slot := cache.take(length)) is not None]
    found: dict[int, Tensor] = {}
    for step in ({0: first[:2], 1: second[:2]}, {1: second[2:], 0: first[2:5]}, {0: first[5:]}):
        parts = [Part(tokens=ids, slot=slots[k], version=None) for k, ids in step.items()]
        found |= dict(zip(step, passing.last_logits(parts), strict=True))
    return [found[0], found[1]]


def _check_same(base: BaseModel, found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Equal but for rounding: another order of sums."""
    logits, wanted = torch.stack(list(found)), torch.stack(list(expected))
    exact = getattr(base.model, "dtype", None) in (torch.float32, torch.float64)
    exact = exact and not getattr(base.model, "is_quantized", False)
    apart = float((logits - wanted).abs().max() / wanted.abs().max())
    if not apart <= (EXACT if exact else ROUNDED):
        raise _refused(base, f"packed prompts change its logits by {100 * apart:.3g} %")
