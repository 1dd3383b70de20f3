"""Whether a model sees a token before it predicts it, asked of the model itself.

An encoder (BERT, RoBERTa, XLM ...) opens as a causal language model and reads the whole row, the
answer that it should learn included: its loss falls and nothing is learned. Three rows of four
tokens start with one token, two of them are equal, the third goes on with others. Behind the first
layer the first position must not differ between the rows. Only that layer is run, milliseconds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flexlora.errors import UserError

__all__ = ["check_causal"]

ROWS = ((0, 1, 2, 3), (0, 1, 2, 3), (0, 4, 5, 6))
VISIBLE = {torch.bfloat16: 3e-3, torch.float16: 3e-3}  # of the largest number; others 1e-5
TOWERS = ("vision", "visual", "audio", "projector")


class _Seen(Exception):
    """Ends a forward pass behind the first layer."""


def check_causal(model: Any, name: str) -> None:
    """Refuse a model whose first layer looks ahead.

    Raises:
        UserError: it does, or it cannot run a row of tokens.
    """
    ahead = _seen_ahead(model, name)
    if ahead is None:
        return
    same, other = (float((row[0] - ahead[0][0]).abs().max()) for row in ahead[1:])
    scale = float(ahead[0][0].abs().max())
    if other > 2 * same + VISIBLE.get(model.dtype, 1e-5) * scale:
        raise UserError(
            f"model '{name}', a {type(model).__name__}, is bidirectional: it sees later tokens, "
            "and so the answer that it should learn to predict; expected a causal language model "
            "(where it was trained as a decoder, its config.json says is_decoder true)."
        )


@torch.enable_grad()
def _seen_ahead(model: Any, name: str) -> Tensor | None:
    """What the first layer puts out, ``[3, 4, hidden]``; None where its shape is not that.

    Embeddings ask for gradients, as in training: without, bitsandbytes repacks the NF4 weights it
    multiplies with on a CPU, and no gradient passes through them afterwards.
    """
    table = model.get_input_embeddings()
    room = int(getattr(table, "num_embeddings", 8))
    ids = torch.tensor(ROWS, device=table.weight.device) % room
    seen: list[Any] = []

    def keep(module: nn.Module, arguments: Any, output: Any) -> None:
        seen.append(output)
        raise _Seen

    hooks = [table.register_forward_hook(lambda _, __, output: output.requires_grad_())]
    if (layer := _first_layer(model)) is not None:
        hooks.append(layer.register_forward_hook(keep))
    try:
        seen.append(model(input_ids=ids, use_cache=False).logits)
    except _Seen:
        pass
    except Exception as error:  # whatever the family's code raises
        first = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"model '{name}', a {type(model).__name__}, cannot run a row of text alone "
            f"({type(error).__name__}: {first}); expected a causal language model."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return _row_major(seen[0])


def _first_layer(model: Any) -> nn.Module | None:
    """The first layer of the language model's stack."""
    for name, module in model.named_modules():
        in_tower = any(tower in name for tower in TOWERS)
        if isinstance(module, nn.ModuleList) and len(module) and not in_tower:
            return module[0]
    return None


def _row_major(output: Any) -> Tensor | None:
    """``[rows, tokens, hidden]`` of a layer's output; Gemma 3n stacks copies, XLNet turns it."""
    while isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor) or output.dim() < 3:
        return None
    output = output.detach().reshape(-1, *output.shape[-3:])[0].float()
    shape = tuple(output.shape[:2])
    if shape == (len(ROWS[0]), len(ROWS)):
        return output.transpose(0, 1)
    return output if shape == (len(ROWS), len(ROWS[0])) else None
