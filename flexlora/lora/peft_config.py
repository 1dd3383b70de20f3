"""``adapter_config.json`` of a PEFT folder: rank, alpha and targets of every module, or a refusal.

An adapter is ``W + scaling * lora_B @ lora_A`` with ``W`` the base's own weight. Every field of
PEFT's ``LoraConfig`` (0.21.2) is in one of three tables here:

    READ       what the product is made of: rank, scaling, which modules
    HARMLESS   how it was trained; the product is the same
    CHANGED    the model is another than that: refused, unless the field is at its default

A field in none of them, of a newer PEFT or of another library, is refused unless it is empty or
false: what it does cannot be known.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexlora.errors import UserError, nearest

__all__ = ["PeftConfig", "matching", "read_config", "read_json_object", "shown"]

READ = {
    *("peft_type", "base_model_name_or_path", "revision", "init_lora_weights"),
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
}
# fan_in_fan_out: how Conv1D stores W; the factors are [rank, in] and [out, rank] either way. The
# *_config of a start are ignored by PEFT where init_lora_weights does not name that start.
HARMLESS = {
    *("task_type", "auto_mapping", "peft_version", "inference_mode", "runtime_config"),
    *("lora_dropout", "fan_in_fan_out", "megatron_core", "qalora_group_size"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "ensure_weight_tying"),
    *("merge_weights", "lora_dtype", "lorap_lr_ratio"),  # an older PEFT's, ms-swift's
}
CHANGED = {
    "use_dora": (False, "DoRA scales the columns of the weight too"),
    "bias": ("none", "biases were trained too"),
    "modules_to_save": (None, "whole modules were trained too"),
    "lora_bias": (False, "lora_B has a bias"),
    "trainable_token_indices": (None, "embeddings of tokens were trained too"),
    "layer_replication": (None, "layers of the base are repeated"),
    "target_parameters": (None, "parameters that belong to no linear layer, as of experts"),
    "megatron_config": (None, "Megatron's parallel layers"),
    "alora_invocation_tokens": (None, "an activated LoRA acts from its invocation on"),
    "use_qalora": (False, "QALoRA pools the inputs"),
    "monteclora_config": (None, "the factors are sampled"),
    "velora_config": (None, "VeLoRA's folder holds its projections too"),
    "use_bdlora": (None, "the factors are block-diagonal"),
    "arrow_config": (None, "Arrow routes tokens between adapters"),
    "kasa_config": (None, "KaSA changes the base's weights"),
}
STARTS_THAT_KEEP_THE_BASE = ("gaussian", "eva", "orthogonal", "mica")  # or true, false, null
CONVERTED = "path_initial_model_for_weight_conversion"  # PEFT's own way back to plain LoRA


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """The fields that are read, checked. ``rank_of`` and ``alpha_of`` are by module name.

    ``rank`` and ``alpha`` are those of modules that no pattern names.
    """

    base: str
    revision: str
    rslora: bool
    rank: int
    alpha: float
    rank_of: Callable[[str], int]
    alpha_of: Callable[[str], float]
    targets: Callable[[str], bool]
    named_modules: tuple[str, ...]


def read_json_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: no such file, rights that are missing, bytes that are not JSON, no object.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        cause = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"'{file}' cannot be read as JSON: {cause}.") from None
    if not isinstance(found, dict):
        raise UserError(f"'{file}' holds a {type(found).__name__}, expected a JSON object.")
    return found


def read_config(file: Path) -> PeftConfig:
    """The configuration of a plain LoRA adapter.

    Raises:
        UserError: a file that cannot be read, another kind of adapter, a base that was changed, a
            value of the wrong type, an unknown field that is set.
    """
    config = read_json_object(file)
    _check_kind(config, file)
    _check_start(config.get("init_lora_weights"), file)
    where = _Fields(config, file)
    rank, alpha = where.required("r", _rank), where.required("lora_alpha", _number)
    targets = where.names("target_modules")
    return PeftConfig(
        base=where.text("base_model_name_or_path"),
        revision=where.text("revision"),
        rslora=where.flag("use_rslora"),
        rank=rank,
        alpha=alpha,
        rank_of=where.pattern("rank_pattern", _rank, rank),
        alpha_of=where.pattern("alpha_pattern", _number, alpha),
        targets=where.targets(targets),
        named_modules=targets if isinstance(targets, tuple) else (),
    )


def matching(pattern: str) -> str:
    """PEFT's rule (``get_pattern_key``): a key matches the whole name, or its end after a dot."""
    return rf"(.*\.)?({pattern})$"


def _check_kind(config: Mapping[str, Any], file: Path) -> None:
    if config.get("peft_type") != "LORA":
        kind = shown(config.get("peft_type"))
        raise UserError(f"'{file}' has peft_type={kind}, expected 'LORA'.")
    for key, value in config.items():
        if key in CHANGED:
            default, why = CHANGED[key]
            if value and value != default:
                raise UserError(
                    f"'{file}' has {key}={shown(value)}, expected {default!r}: "
                    f"only plain LoRA factors can be read ({why})."
                )
        elif key not in READ and key not in HARMLESS and value:
            raise UserError(
                f"'{file}' has {shown(key)[1:-1]}={shown(value)}, which FlexLoRA does not know."
                f"{nearest(key, READ | HARMLESS | set(CHANGED))} Remove the field if the adapter "
                "is plain LoRA without it."
            )


def _check_start(start: object, file: Path) -> None:
    """Refuse factors whose start was subtracted from the base: they belong to what was left."""
    if start is None or isinstance(start, bool):
        return
    if isinstance(start, str) and start.lower() in STARTS_THAT_KEEP_THE_BASE:
        return
    remedy = f"save it again with PEFT's save_pretrained(..., {CONVERTED}=...)"
    if start == "loftq":
        remedy = "merge it into the base that LoftQ made and use that model"
    raise UserError(
        f"'{file}' has init_lora_weights={shown(start)}: these factors belong to a base whose "
        f"weights were changed when training began, not to the model it names; {remedy}."
    )


class _Fields:
    """Typed access to the fields; every error names the file, the field and its value."""

    def __init__(self, config: Mapping[str, Any], file: Path) -> None:
        self._config, self._file = config, file

    def refusal(self, key: str, value: object, expected: str) -> UserError:
        return UserError(f"'{self._file}' has {key}={shown(value)}, expected {expected}.")

    def required(self, key: str, read: Callable[[object], Any]) -> Any:
        if key not in self._config:
            raise UserError(f"'{self._file}' lacks '{key}'.")
        return self._read(key, self._config[key], read)

    def _read(self, key: str, value: object, read: Callable[[object], Any]) -> Any:
        try:
            return read(value)
        except (TypeError, ValueError, OverflowError):
            expected = "a whole number above 0" if read is _rank else "a positive number"
            raise self.refusal(key, value, expected) from None

    def text(self, key: str) -> str:
        value = self._config.get(key)
        if value is not None and not isinstance(value, str):
            raise self.refusal(key, value, "a text")
        return value or ""

    def flag(self, key: str) -> bool:
        value = self._config.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.refusal(key, value, "true or false")
        return bool(value)

    def names(self, key: str) -> str | tuple[str, ...] | None:
        """A regular expression, or names; None where the field is not there or null."""
        value = self._config.get(key)
        if value is None or isinstance(value, str):
            return value
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise self.refusal(key, value, "a text or a list of names")
        return tuple(value)

    def pattern(
        self, key: str, read: Callable[[object], Any], default: Any
    ) -> Callable[[str], Any]:
        """The value of the first pattern that matches a name, the default where none does."""
        value = self._config.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.refusal(key, value, "an object of values by module")
        entries = [
            (
                name,
                self.compiled(key, matching(name)),
                self._read(f"{key}[{shown(name)}]", item, read),
            )
            for name, item in (value or {}).items()
        ]
        literal = {name: item for name, _, item in entries}

        def value_of(module: str) -> Any:
            for _, regex, item in entries:
                if regex.match(module):
                    return item
            return literal.get(module, default)

        return value_of

    def compiled(self, key: str, pattern: str) -> re.Pattern[str]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            expected = f"a regular expression ({error})"
            raise self.refusal(key, pattern, expected) from None

    def targets(self, names: str | tuple[str, ...] | None) -> Callable[[str], bool]:
        """PEFT's rule (``check_target_module_exists``); True where the base decides."""
        excluded = self.chosen_by("exclude_modules", self.names("exclude_modules") or ())
        layers = self._layers(names)
        if names is None or names == "all-linear":
            return lambda module: not excluded(module)
        chosen, whole = self.chosen_by("target_modules", names), frozenset(names)
        return lambda module: (
            not excluded(module) and chosen(module) and (module in whole or layers(module))
        )

    def chosen_by(self, key: str, names: str | tuple[str, ...]) -> Callable[[str], bool]:
        if isinstance(names, str):
            regex = self.compiled(key, names)
            return lambda module: regex.fullmatch(module) is not None
        exact, ends = frozenset(names), tuple(f".{name}" for name in names)
        return lambda module: module in exact or module.endswith(ends)

    def _layers(self, names: str | tuple[str, ...] | None) -> Callable[[str], bool]:
        """Whether the layer that a module is in is one of ``layers_to_transform``."""
        value = self._config.get("layers_to_transform")
        indices = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(index) is not int for index in indices):
            raise self.refusal("layers_to_transform", value, "whole numbers")
        given = self.names("layers_pattern") or ()
        lists = (given,) if isinstance(given, str) else given
        patterns = [rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\." for name in lists]
        patterns = patterns or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
        regexes = [self.compiled("layers_pattern", pattern) for pattern in patterns]
        if not indices or isinstance(names, str):
            return lambda module: True

        known = {str(index).lstrip("0") for index in indices}  # as text: \d+ has no bound

        def in_layers(module: str) -> bool:
            found = next(filter(None, (regex.match(module) for regex in regexes)), None)
            index = found["idx"] if found is not None else None
            return index is not None and index.lstrip("0") in known

        return in_layers


def _rank(value: object) -> int:
    if type(value) is not int or value < 1:
        raise ValueError
    return value


def _number(value: object) -> float:
    """Finite and above 0; a whole number too large for a float raises OverflowError."""
    if type(value) not in (int, float) or not 0 < float(value) < float("inf"):  # type: ignore[arg-type]
        raise ValueError
    return float(value)  # type: ignore[arg-type]


def shown(value: object) -> str:
    """A value of a file in one line of at most 120 characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # whole numbers of thousands of digits
        text = f"a {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= 120 else f"{text[:117]}..."
