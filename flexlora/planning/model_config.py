"""The sizes of the base behind a model's name, from its ``config.json`` alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexlora.config.base_config import base_config, not_causal
from flexlora.errors import UserError, one_line, reason
from flexlora.planning.architectures import shape_from_config
from flexlora.planning.shapes import ModelShape

__all__ = ["read_shape"]


def read_shape(name: str) -> ModelShape:
    """The shape of a model folder, of ``embedded``, or of a hub model.

    Of a model of images or sound and text it is the language model's, with the parameters of the
    rest as ``tower_numbers``; only these need torch, seconds to import.

    Raises:
        UserError: a base that is refused (``config/base_config.py``), or one whose architecture
            the planner does not know.
    """
    config = base_config(name)
    if not isinstance(config.get("text_config"), Mapping):
        return shape_from_config(config)
    return _with_towers(config, name)


def _with_towers(config: Mapping[str, Any], name: str) -> ModelShape:
    """The language model's shape, and what transformers' own code builds beside it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if config["model_type"] not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise not_causal(name, config["model_type"])
    whole = _completed(config, name)
    dtype = config.get("dtype") or config.get("torch_dtype")
    text = whole.get_text_config().to_dict()
    shape = shape_from_config(text | ({"dtype": dtype} if dtype else {}))
    towers = _count(whole, name) - shape.num_parameters
    return replace(shape, model_type=str(config["model_type"]), tower_numbers=towers)


def _completed(config: Mapping[str, Any], name: str) -> Any:
    """The configuration with its family's defaults; a ``text_config`` leaves out most of them."""
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**config)
    except Exception as error:  # the families raise different errors
        raise UserError(
            f"config.json of model '{name}' is refused by transformers: {reason(error)}"
        ) from error


def _count(config: Any, name: str) -> int:
    """Parameters of the model, tied ones once, built without memory for their numbers."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # a package that a tower needs, sizes that do not fit
        raise UserError(
            f"model '{name}' has parts beside its language model that cannot be counted: "
            f"{one_line(error)}"
        ) from error
    return sum(parameter.numel() for parameter in model.parameters())
