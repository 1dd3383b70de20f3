"""One tiny pass of a base model: which of its linears can have a LoRA layer with slots.

Three rows of five tokens go through the plain model, with the same arguments as a training pass.
The loss is that of one answer token in the last row, and its gradient with respect to every
linear's output and to the input embeddings shows, beyond rounding (1e-5 of the largest number):

    no gradient at all      a vision tower, a projection whose weight other code multiplies itself,
                            an index of the tokens to attend to
    [rows, ...] not leading the rows are not slot-major: time first, tokens sorted by expert, or
                            answer tokens alone behind ``logits_to_keep``
    another shape           a product in blocks, to which ``B A x`` cannot be added
    gradient in other rows  the rows affect each other, so would the clients of a cohort
    gradient at later       the model sees the tokens that it is asked to predict: an encoder
      tokens

The sizes (3 rows, 5 tokens, 7 answer tokens) differ, so no shape is right by coincidence. The
outcome depends on the architecture and its configuration, not on weights, dtype or device, so a
server and all of its clients find the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flexlora.errors import UserError, one_line

__all__ = ["Findings", "try_pass", "usual_tokens"]

ROWS, TOKENS = 3, 5
ROW, POSITION = 2, 2  # of the answer token whose loss is taken: any other order moves it
KEEP = ((0, 1, 1, 0, 0), (0, 0, 1, 0, 0), (1, 1, 1, 1, 0))  # 7 answer tokens
# What one pass of equal rows cannot show, found by comparing batches with single rows.
UNEQUAL = {
    "cpmant": "its attention takes padding for text, so a row depends on the others' lengths",
    "prophetnet": "its attention depends on the width of the batch, so rows affect each other",
    "rwkv": "in transformers its generation mixes the rows of a batch",
}
UNREACHED = "no gradient reaches them"


@dataclass(frozen=True, kw_only=True)
class Findings:
    """``causes`` of linears without LoRA, by name; ``whole_logits``: pass no ``logits_to_keep``."""

    causes: Mapping[str, str] = field(default_factory=dict)
    whole_logits: bool = False


@dataclass(eq=False)
class _Seen:
    """Outputs of the linears and of the embeddings in one pass, and linears with odd ones."""

    outputs: dict[str, list[Tensor]] = field(default_factory=dict)
    odd: dict[str, str] = field(default_factory=dict)
    embedded: list[Tensor] = field(default_factory=list)

    def linear(self, name: str, module: Any, inputs: Any, output: Any) -> Any:
        if not isinstance(output, Tensor):
            self.odd[name] = f"they return a {type(output).__name__}"
            return output
        before = tuple(inputs[0].shape) if inputs and isinstance(inputs[0], Tensor) else (0,)
        width = getattr(module, "out_features", output.shape[-1])
        if output.shape != (*before[:-1], width):
            self.odd[name] = "their code is more than a product with one matrix"
        elif before[0] not in (ROWS, ROWS * TOKENS):
            self.odd[name] = "their inputs are not in the order of the rows"
        return self._leaf(output, self.outputs.setdefault(name, []))

    def embedding(self, output: Any) -> Any:
        return self._leaf(output, self.embedded) if isinstance(output, Tensor) else output

    @staticmethod
    def _leaf(output: Tensor, into: list[Tensor]) -> Tensor:
        if not output.requires_grad:  # it depends on no token, or is the first of all
            output = output.detach().requires_grad_()
        into.append(output)
        return output.clone()  # in-place changes must not reach what is recorded


def try_pass(model: Any, linears: Iterable[str]) -> Findings:
    """Run the pass; ``linears`` are the names of the modules to judge.

    Raises:
        UserError: the pass fails, rows affect each other, a token sees later ones, or a family
            that is known to compute rows of unequal lengths otherwise.
    """
    names = list(linears)
    if model.config.model_type in UNEQUAL:
        raise _refused(model, UNEQUAL[model.config.model_type])
    seen, logits = _run(model, names, sliced=True)
    behind = [name for name in seen.odd if name in seen.outputs] if logits.dim() == 2 else []
    whole_logits = False
    if behind:
        again, whole = _run(model, names, sliced=False)
        whole_logits = any(name not in again.odd for name in behind)
        if whole_logits:
            seen, logits = again, whole
    return Findings(causes=_judged(model, names, seen, logits), whole_logits=whole_logits)


def _run(model: Any, names: list[str], *, sliced: bool) -> tuple[_Seen, Tensor]:
    seen, keep = _Seen(), torch.tensor(KEEP, dtype=torch.bool)
    device, ids = next(model.parameters()).device, usual_tokens(model, ROWS * TOKENS)
    ids = ids.reshape(ROWS, TOKENS)
    options = {"logits_to_keep": keep.to(device)} if sliced else {}
    with _watching(model, names, seen), torch.enable_grad():
        try:
            output = model(input_ids=ids.to(device), use_cache=False, **options)
            return seen, output.logits
        except Exception as error:  # whatever the model's code raises
            raise _refused(model, f"a pass of text alone fails ({one_line(error)})") from error


@contextmanager
def _watching(model: Any, names: list[str], seen: _Seen) -> Iterator[None]:
    def hook(name: str) -> Any:
        return lambda module, inputs, output: seen.linear(name, module, inputs, output)

    hooks = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    embeddings = model.get_input_embeddings()
    if isinstance(embeddings, nn.Module):
        watch = embeddings.register_forward_hook(lambda module, inputs, out: seen.embedding(out))
        hooks.append(watch)
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def usual_tokens(model: Any, count: int) -> Tensor:
    """``[count]`` token ids, different where the vocabulary is not tiny, without special ones."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    size = weight.shape[0] if weight is not None else int(model.config.vocab_size)
    special = set(_named_tokens(model.config.to_dict()))
    usual = [i for i in range(size // 3, size) if i not in special] or list(range(size))
    return torch.tensor([usual[k % len(usual)] for k in range(count)])


def _named_tokens(values: Mapping[str, Any]) -> Iterator[int]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _named_tokens(value)
        elif isinstance(value, int) and "token" in key:
            yield value


def _judged(model: Any, names: list[str], seen: _Seen, logits: Tensor) -> dict[str, str]:
    """The causes by linear.

    Raises:
        UserError: no linear is reached, rows affect each other, or a token sees later ones.
    """
    flat = [(name, tensor) for name, tensors in seen.outputs.items() for tensor in tensors]
    gradients = _gradients(model, _loss(logits), [tensor for _, tensor in flat], seen.embedded)
    reached = set()
    odd = dict(seen.odd)
    for (name, _), gradient in zip(flat, gradients, strict=False):
        if gradient is None:
            continue
        reached.add(name)
        if name not in odd and _elsewhere(gradient):
            odd[name] = "their inputs are not in the order of the rows"
    _check_order(model, gradients[len(flat) :])
    # A reached linear with an odd call, and one whose result is no tensor: by their own cause.
    causes = {name: UNREACHED for name in names if name not in reached}
    return causes | odd


def _loss(logits: Tensor) -> Tensor:
    """Of one token, ``-log softmax`` of the last word."""
    before = sum(map(sum, KEEP[:ROW])) + sum(KEEP[ROW][:POSITION])
    row = logits[ROW, POSITION] if logits.dim() == 3 else logits[before]
    return -row.float().log_softmax(-1)[-1]


def _gradients(
    model: Any, loss: Tensor, outputs: list[Tensor], embedded: list[Tensor]
) -> tuple[Tensor | None, ...]:
    if not loss.requires_grad:
        return (None,) * (len(outputs) + len(embedded))
    try:
        return torch.autograd.grad(loss, [*outputs, *embedded], allow_unused=True)
    except Exception as error:  # whatever the model's code raises
        raise _refused(model, f"its backward pass fails ({one_line(error)})") from error


def _elsewhere(gradient: Tensor) -> bool:
    """Whether rows other than ``ROW`` of ``[ROWS, ...]`` or ``[ROWS * TOKENS, ...]`` have one."""
    by_row = gradient.reshape(ROWS, -1)
    return _matters(by_row[[row for row in range(ROWS) if row != ROW]], by_row)


def _matters(part: Tensor, whole: Tensor) -> bool:
    """Whether ``part`` is more than rounding beside ``whole``; exact zeros where masks are."""
    return float(part.abs().nan_to_num().max()) > 1e-5 * float(whole.abs().nan_to_num().max())


def _check_order(model: Any, gradients: Iterable[Tensor | None]) -> None:
    for gradient in gradients:
        if gradient is None or gradient.shape[:2] != (ROWS, TOKENS):
            continue
        if _elsewhere(gradient):
            raise _refused(model, "the rows of a batch affect each other, and so would clients")
        if _matters(gradient[ROW, POSITION + 1 :], gradient):
            why = "a token sees the tokens after it, so the loss would be that of known answers"
            raise _refused(model, f"{why}; expected a causal model (is_decoder=true)")


def _refused(model: Any, why: str) -> UserError:
    return UserError(f"model type '{model.config.model_type}' cannot be trained: {why}.")
