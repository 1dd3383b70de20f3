"""Whether a model gives a left-padded prompt the same continuation as the prompt alone.

Most decoders take positions and attention from ``attention_mask``. Some count padding as tokens:
state-space models without a mask, decoders of translation models, which number their positions
from the first column.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexlora.errors import UserError, one_line
from flexlora.training.slots import SlotModel
from flexlora.training.targets import is_plain
from flexlora.training.trial_pass import usual_tokens

__all__ = ["takes_padding"]

_TAKES = "_flexlora_takes_padding"
PROMPT, PADDING = 3, 2
ROUNDING = 1e-3  # of the largest logit: another length is another order of sums


def takes_padding(slots: SlotModel) -> bool:
    """Compare the first generated token's logits with and without padding, once per model.

    Raises:
        UserError: generation fails.
    """
    model = slots.model
    if not hasattr(model, "get_input_embeddings") or is_plain(model):
        return True
    if not hasattr(model, _TAKES):
        with slots.first_slots(0):
            setattr(model, _TAKES, _same(model))
    return getattr(model, _TAKES)


@torch.no_grad()
def _same(model: Any) -> bool:
    tokens = usual_tokens(model, PROMPT + PADDING)[None].to(next(model.parameters()).device)
    mask = torch.ones_like(tokens)
    mask[:, :PADDING] = 0
    try:
        alone = _first_logits(model, tokens[:, PADDING:], mask[:, PADDING:])
        padded = _first_logits(model, tokens, mask)
    except Exception as error:  # whatever the model's code raises
        kind = model.config.model_type
        raise UserError(
            f"model type '{kind}' cannot generate ({one_line(error)}); set eval.generate=never."
        ) from error
    return float((alone - padded).abs().max()) <= ROUNDING * float(alone.abs().max())


def _first_logits(model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    output = model.generate(
        input_ids=tokens,
        attention_mask=mask,
        max_new_tokens=1,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.logits[0].float()
