"""Read the ``config.json`` of a base, and refuse bases that it shows cannot be trained.

``flexlora plan``, ``client init``, the server and ``load_base`` read it here, so that they refuse
the same bases in the same words. Neither torch nor transformers is imported for a base that is
not refused.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flexlora.config.paths import ADAPTER, expanded, resolve_name
from flexlora.errors import UserError, nearest

__all__ = ["base_config", "config_file", "not_causal", "read_config"]

# Heads of classes that score or label a text; the others are language models.
OTHER_HEADS = (
    *("Classification", "QuestionAnswering", "MaskedLM", "MultipleChoice", "SentencePrediction"),
    *("RewardModel", "ForPreTraining", "ForRegression"),
)

# The same rounding that a float checkpoint gets while it is loaded, or nothing of ours.
SAME_QUANTIZATION = {"bitsandbytes 4-bit": "nf4", "bitsandbytes 8-bit": "8bit"}


def base_config(name: str) -> dict[str, Any]:
    """The ``config.json`` of a folder, a hub model, ``embedded`` or a file, if it can be trained.

    Raises:
        UserError: the file is missing or not JSON, another folder than a base's, an encoder, a
            model of another task, a quantized checkpoint, an architecture whose code transformers
            does not have.
    """
    file = config_file(name)
    config = read_config(file)
    if file.name == "config.json" and (file.parent / ADAPTER).is_file():
        raise UserError(
            f"model folder '{name}' holds an adapter ({ADAPTER}) beside the base, and it is not "
            f"clear which of the two is meant; move the adapter's files into another folder."
        )
    for refusal in (_of_unknown_code, _of_quantized_weights, *_OF_KIND):
        if (cause := refusal(config)) is not None:
            raise UserError(f"model '{name}' {cause}")
    return config


def not_causal(name: str, model_type: str) -> UserError:
    """The refusal of a family that transformers has no causal language model for."""
    return UserError(
        f"model '{name}' is a '{model_type}', for which transformers has no causal language "
        "model; expected a model that continues text."
    )


def config_file(name: str) -> Path:
    """The path of a model's ``config.json``; for a hub name this one file is downloaded.

    Raises:
        UserError: no such file, folder or hub model.
    """
    file = Path(expanded(name))
    if file.suffix == ".json" and file.is_file():
        return file
    source = resolve_name(name)
    return Path(source) / "config.json" if Path(source).is_dir() else _from_hub(source)


def read_config(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: it cannot be read, starts with a byte-order mark (transformers reads none), is
            not JSON or no object.
    """
    try:
        text = file.read_text(encoding="utf-8")
        if text.startswith("\ufeff"):
            raise UserError(f"'{file}' starts with a byte-order mark; save it as UTF-8 without it.")
        config = json.loads(text)
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"'{file}' cannot be read as JSON: {error}.") from None
    if not isinstance(config, dict):
        raise UserError(f"'{file}' holds {type(config).__name__}, expected an object of keys.")
    return config


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # no line per retry: the last error is reported below
    try:
        return Path(hf_hub_download(name, "config.json"))
    except Exception as error:  # the hub client raises many types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"config.json of '{name}' cannot be fetched: {reason}") from None
    finally:
        logging.set_verbosity(verbosity)


def _of_unknown_code(config: Mapping[str, Any]) -> str | None:
    """Refuse an architecture that only code in the folder implements: it is never run.

    Where transformers has the architecture, its code is used, whatever ``auto_map``
    names.
    """
    model_type, code = config.get("model_type"), config.get("auto_map")
    if not isinstance(model_type, str) or not model_type:
        return "has no model_type in its config.json; expected the name of an architecture."
    if not code or _has_package(model_type) or model_type in (known := _known_model_types()):
        return None
    files = sorted({f"{name.partition('.')[0]}.py" for name in _names(code)})
    return (
        f"has the model_type '{model_type}', which transformers does not have, and brings code of "
        f"its own ({', '.join(files)}, named by auto_map in config.json); FlexLoRA never runs "
        "code of a model folder: give a model whose architecture transformers has."
        + nearest(model_type, known)
    )


def _has_package(model_type: str) -> bool:
    """Whether transformers has a package of that name, without the seconds that importing takes."""
    spec = importlib.util.find_spec("transformers")
    package = model_type.replace("-", "_")
    if spec is None or spec.origin is None or not package.isidentifier():
        return False
    return (Path(spec.origin).parent / "models" / package).is_dir()


def _known_model_types() -> Iterable[str]:
    from transformers import CONFIG_MAPPING

    return list(CONFIG_MAPPING.keys())


def _names(code: Any) -> Iterable[str]:
    """The strings of an ``auto_map``: values are a name, or a list of names and None."""
    if isinstance(code, str):
        return [code.rpartition("--")[2]]
    inner = code.values() if isinstance(code, Mapping) else code if isinstance(code, list) else ()
    return [name for value in inner for name in _names(value)]


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The configuration, and that of the language model within a multimodal one."""
    text = config.get("text_config")
    return [config, text] if isinstance(text, Mapping) else [config]


def _of_quantized_weights(config: Mapping[str, Any]) -> str | None:
    found = next((p["quantization_config"] for p in _parts(config) if _quantized(p)), None)
    if found is None:
        return None
    kind = _quantization_name(found)
    if kind in SAME_QUANTIZATION:
        remedy = f"which model.quantization={SAME_QUANTIZATION[kind]} rounds while loading"
    else:
        remedy = "or dequantize it and save it; model.quantization=nf4 makes it small while loading"
    return (
        f"is quantized already ({kind}, by quantization_config in its config.json), and FlexLoRA "
        f"quantizes float weights itself; give the checkpoint it was made from, {remedy}."
    )


def _quantized(part: Mapping[str, Any]) -> bool:
    return bool(part.get("quantization_config"))


def _quantization_name(found: Any) -> str:
    """``gptq``, ``fp8``, ``bitsandbytes 4-bit`` ..."""
    if not isinstance(found, Mapping):
        return "an unknown method"
    bits = {"load_in_4bit": "4-bit", "load_in_8bit": "8-bit"}
    width = next((text for key, text in bits.items() if found.get(key)), "")
    method = str(found.get("quant_method") or ("bitsandbytes" if width else "an unknown method"))
    return f"{method} {width}".strip()


def _of_no_decoder(config: Mapping[str, Any]) -> str | None:
    """Refuse what is known to read the whole text; loading asks the model itself."""
    for part in _parts(config):
        if part.get("is_encoder_decoder"):
            return (
                f"is an encoder with a decoder ('{part.get('model_type')}', is_encoder_decoder in "
                "its config.json); expected a causal language model, a decoder alone."
            )
        both = part.get("use_bidirectional_attention")
        if both is True or both == "all":
            return (
                "is bidirectional (use_bidirectional_attention in its config.json): it would see "
                "the answer that it learns to predict; expected a causal language model."
            )
    return None


def _of_an_assistant(config: Mapping[str, Any]) -> str | None:
    if not config["model_type"].endswith("_assistant"):
        return None
    return (
        f"is a '{config['model_type']}', which drafts tokens from the states of another model and "
        "reads no text by itself; expected a causal language model, such as that other one."
    )


def _of_another_head(config: Mapping[str, Any]) -> str | None:
    named = config.get("architectures")
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    if not names or not all(any(head in name for head in OTHER_HEADS) for name in names):
        return None
    return (
        f"is a {names[0]} (architectures in its config.json), which does not predict the next "
        "token; expected a causal language model, such as the one it was made from."
    )


_OF_KIND = (_of_no_decoder, _of_an_assistant, _of_another_head)
