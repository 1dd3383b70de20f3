"""Which linears of a model get LoRA, and why the others do not.

``all-linear`` is PEFT's: every linear but the output layer. Left out are linears that text never
reaches or that mix the rows of a batch (``trial_pass``), and those that PEFT cannot load
(``lora/peft_names``). The outcome is the same wherever the model is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from flexlora.errors import UserError, nearest
from flexlora.lora.adapters import Adapter
from flexlora.lora.peft_names import peft_cause, unaddressable
from flexlora.training.trial_pass import Findings, try_pass

__all__ = [
    "Targets",
    "choose_targets",
    "find_targets",
    "is_plain",
    "linear_shape",
    "linear_shapes",
    "misfit",
    "shape_misfit",
]

FUSED = "experts are fused parameters, which this version does not adapt"

_FINDINGS = "_flexlora_findings"  # the attribute of a model that has its trial pass's

# Decoders of equal layers whose every linear is on the way from the tokens to the logits, whatever
# their configuration says: checked for every one of them by the tests, not at every start.
PLAIN = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gpt2", "gpt_neox", "phi", "phi3")


@dataclass(frozen=True, kw_only=True)
class Targets:
    """``shapes`` ``{name: (out_features, in_features)}`` in model order.

    ``left_out`` are causes by name; ``note`` is one line about what LoRA does not reach, empty
    where it reaches all; ``whole_logits``: a pass must not leave out positions.
    """

    shapes: dict[str, tuple[int, int]]
    left_out: dict[str, str] = field(default_factory=dict)
    note: str = ""
    whole_logits: bool = False


def linear_shape(module: Any) -> tuple[int, int] | None:
    """``(out_features, in_features)`` of a linear of any supported kind, None for other modules."""
    if isinstance(module, nn.Linear):  # bitsandbytes' quantized linears among them
        return module.out_features, module.in_features
    if type(module).__name__ == "Conv1D":
        in_features, out_features = module.weight.shape
        return out_features, in_features
    return None


def linear_shapes(model: Any) -> dict[str, tuple[int, int]]:
    """``{name: (out_features, in_features)}`` of all linears of ``model``."""
    return {
        name: shape
        for name, module in model.named_modules()
        if (shape := linear_shape(module)) is not None
    }


def misfit(adapter: Adapter, model: Any) -> str:
    """Which module the model lacks, or has in another shape; empty where all fit."""
    return shape_misfit(adapter, linear_shapes(model))


def shape_misfit(adapter: Adapter, shapes: Mapping[str, tuple[int, int]]) -> str:
    """``misfit`` by the ``linear_shapes`` of a model."""
    for name, factors in adapter.items():
        if name not in shapes:
            return f"the base has no linear '{name}'.{nearest(name, shapes)}"
        wanted = (factors.out_features, factors.in_features)
        if shapes[name] != wanted:
            return f"'{name}' is {shapes[name]} in the base, the adapter's is {wanted}."
    return ""


def find_targets(model: nn.Module, target_modules: str) -> dict[str, tuple[int, int]]:
    """The shapes of ``choose_targets``: ``{name: (out_features, in_features)}``."""
    return choose_targets(model, target_modules).shapes


def choose_targets(model: nn.Module, target_modules: str) -> Targets:
    """The linears that get LoRA, as PEFT would pick them, without those that cannot have it.

    ``all-linear`` is every linear but the output layer, which is never a target; names separated by
    commas match a whole name or its end after a dot; anything else is a regular expression that
    matches a whole name.

    Raises:
        UserError: nothing matches, the expression cannot be read, no matching linear can have
            LoRA, or the model is not a causal one.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linears = {
        name: shape
        for name, module in model.named_modules()
        if (shape := linear_shape(module)) is not None and module is not head
    }
    matching = _matching(linears, target_modules)
    findings = _findings(model, linears)
    model_type = str(getattr(getattr(model, "config", None), "model_type", ""))
    left_out = {
        name: cause
        for name in matching
        if (cause := findings.causes.get(name) or peft_cause(model_type, name))
    }
    shapes = {name: shape for name, shape in matching.items() if name not in left_out}
    names = [name for name, _ in model.named_modules()]
    for name, other in unaddressable(shapes, names).items():
        left_out[name] = f"PEFT would take their names for '{other}' too"
        del shapes[name]
    if not shapes:
        raise UserError(
            f"lora.target-modules is '{target_modules}', and none of the {len(matching)} linears "
            f"of '{model_type}' that it matches can have LoRA: {_spelled(left_out)}."
        )
    targets = Targets(shapes=shapes, left_out=left_out, whole_logits=findings.whole_logits)
    return replace(targets, note=_note(model, linears, targets)) if model_type else targets


def _findings(model: Any, linears: Mapping[str, object]) -> Findings:
    """The trial pass's, run once per model; empty for what cannot run or needs none."""
    known = getattr(model, _FINDINGS, None)
    if known is not None:
        return known
    findings = Findings()
    if _wants_trial(model):
        findings = try_pass(model, linears)
    setattr(model, _FINDINGS, findings)
    return findings


def _wants_trial(model: Any) -> bool:
    if not hasattr(model, "get_input_embeddings") or not hasattr(model, "config"):
        return False  # not a language model of transformers
    if any(parameter.is_meta for parameter in model.parameters()):
        return False  # nothing is trained in it
    return not is_plain(model)


def is_plain(model: Any) -> bool:
    """Whether the model is one of ``PLAIN``, in transformers' own code."""
    known = type(model).__module__.startswith("transformers.models.")
    return known and model.config.model_type in PLAIN


def _matching(
    linears: dict[str, tuple[int, int]], target_modules: str
) -> dict[str, tuple[int, int]]:
    if target_modules == "all-linear" and linears:
        return linears
    items = [item.strip() for item in target_modules.split(",")]
    by_item = {item: [n for n in linears if n == item or n.endswith(f".{item}")] for item in items}
    unmatched = [item for item in items if not by_item[item]]
    if not unmatched:
        return {n: linears[n] for n in linears if any(n in names for names in by_item.values())}
    found = _by_expression(linears, target_modules) if len(unmatched) == len(items) else {}
    if not found:
        leaves = sorted({name.rpartition(".")[2] for name in linears})
        odd = target_modules if len(unmatched) == len(items) else unmatched[0]
        raise UserError(
            f"lora.target-modules is '{odd}', which matches no linear module of the model, "
            f"expected 'all-linear' or some of {', '.join(leaves) or 'none'}."
            f"{nearest(odd.rpartition('.')[2], leaves)}"
        )
    return found


def _by_expression(
    linears: dict[str, tuple[int, int]], expression: str
) -> dict[str, tuple[int, int]]:
    try:
        return {n: shape for n, shape in linears.items() if re.fullmatch(expression, n)}
    except re.error as error:
        raise UserError(
            f"lora.target-modules is '{expression}', which is neither a list of names nor a "
            f"regular expression: {error}."
        ) from None


def _spelled(left_out: Mapping[str, str]) -> str:
    """``2 linears (dt_proj) are left out, as CAUSE``, by cause in model order."""
    by_cause: dict[str, list[str]] = {}
    for name, cause in left_out.items():
        by_cause.setdefault(cause, []).append(name)
    parts = []
    for cause, names in by_cause.items():
        leaves = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
        more = ", ..." if len(leaves) > 4 else ""
        count = f"{len(names)} linears" if len(names) > 1 else "1 linear"
        are = "are" if len(names) > 1 else "is"
        parts.append(f"{count} ({', '.join(leaves[:4])}{more}) {are} left out, as {cause}")
    return "; ".join(parts)


def _note(model: Any, linears: Mapping[str, tuple[int, int]], chosen: Targets) -> str:
    """One line about what LoRA does not reach; empty where nothing is left out.

    The share is of all matrices but embeddings and the output layer.
    """
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    fused = others = 0
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        known = linear_shape(owner) is not None or isinstance(owner, nn.Embedding)
        if parameter.dim() < 2 or known or owner in ends:
            continue
        if parameter.dim() == 3 and "expert" in f"{name} {type(owner).__name__}".lower():
            fused += parameter.numel()
        else:
            others += parameter.numel()
    if not (fused or chosen.left_out):
        return ""
    total = fused + others + sum(out * width for out, width in linears.values())
    share = sum(out * width for out, width in chosen.shapes.values()) / total
    causes = [FUSED] if fused else []
    if chosen.left_out:
        causes.append(_spelled(chosen.left_out))
    return f"lora covers {100 * share:.0f} % of the weights: {'; '.join(causes)}"
