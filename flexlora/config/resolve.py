"""A configuration: every key with its value, checked once at each entry point.

Keys are dotted and kebab-case, the same in a TOML file, in ``--set key=value`` and in
``flwr run --run-config``. Each is a field of a section: ``train.max-steps`` is
``config.train.max_steps``. ``config.method`` holds the options of the chosen method, whose file
declares them, so that resolving a configuration imports that file and torch; ``KEYS`` does not.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, SerializeAsAny, ValidationError
from pydantic.fields import FieldInfo

from flexlora.aggregation import METHODS, method_class, method_options
from flexlora.aggregation.engine.options import MethodOptions, Options, in_a_sentence, kebab_case
from flexlora.config import sections
from flexlora.config.cores import free_cores
from flexlora.config.paths import read_text
from flexlora.errors import UserError, nearest

__all__ = [
    "KEYS",
    "Config",
    "Scalar",
    "all_keys",
    "flatten",
    "flower_table",
    "of_flower",
    "read_toml",
    "resolved",
]

Scalar = bool | int | float | str
Model = TypeVar("Model", bound=Options)
METHOD = "carried"
# Removed options that older versions wrote for every method, with the value that had no effect.
RETIRED = {
    "method.max-update-norm": 0.0,
    "method.realign": False,
    "method.restarts": 0,
    "method.singular-values": "b-heavy",
    "method.server-learning-rate": 0.0,
}


class Config(sections.Run):
    """All keys resolved to values: immutable, complete, checked one by one.

    ``flexlora.server.settings.check_config`` checks combinations of keys.
    """

    clients: sections.Clients = sections.Clients()
    method: SerializeAsAny[MethodOptions] = Field(default_factory=lambda: method_options(METHOD))
    ranks: sections.Ranks = sections.Ranks()
    lora: sections.Lora = sections.Lora()
    model: sections.Model = sections.Model()
    data: sections.Data = sections.Data()
    train: sections.Train = sections.Train()
    eval: sections.Eval = sections.Eval()
    personal: sections.Personal = sections.Personal()
    sampling: sections.Sampling = sections.Sampling()
    privacy: sections.Privacy = sections.Privacy()
    audit: sections.Audit = sections.Audit()
    robust: sections.Robust = sections.Robust()
    population: sections.Population = sections.Population()
    engine: sections.Engine = sections.Engine()
    wire: sections.Wire = sections.Wire()
    server: sections.Server = sections.Server()

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Config:
        """From dotted keys; the others have their defaults.

        Raises:
            UserError: an unknown key (with the nearest known one), a value of the wrong type or
                out of range, an option that the chosen method does not have.
        """
        tree: dict[str, dict[str, Any]] = {"": {}, "method": {}}
        for key, value in values.items():
            section, _, leaf = key.rpartition(".")
            if key not in KEYS and section != "method":
                raise _unknown(key)
            tree.setdefault(section, {})[leaf] = value
        method = method_options(tree["method"].pop("name", METHOD), tree.pop("method"))
        top = _checked(sections.Run, tree.pop(""))
        made: dict[str, Any] = {
            name: _checked(SECTIONS[name], given, f"{name}.") for name, given in tree.items()
        }
        return cls(method=method, **dict(top), **made)

    @classmethod
    def resolve(cls, *, file: str | Path | None = None, sets: Sequence[str] = ()) -> Config:
        """Defaults, then the TOML ``file``, then each ``key=value`` of ``sets``.

        Raises:
            UserError: whatever ``of`` refuses, a missing or malformed file, a ``--set`` without
                ``=``.
        """
        return cls.of(cls.given(file=file, sets=sets))

    @staticmethod
    def given(*, file: str | Path | None = None, sets: Sequence[str] = ()) -> dict[str, Any]:
        """The values in ``file`` and ``sets``, by dotted key, without defaults; see ``resolve``."""
        values: dict[str, Any] = read_toml(file) if file else {}
        for item in sets:
            key, equals, text = item.partition("=")
            if not equals:
                raise UserError(f"--set got '{item}', expected key=value.")
            values[key.strip()] = _parsed(key.strip(), text)
        return values

    def with_values(self, values: Mapping[str, Any]) -> Config:
        """A copy with other values by dotted key; a changed method has its default options."""
        current = self.flat()
        if values.get("method.name", self.method.name) != self.method.name:
            current = {k: v for k, v in current.items() if not k.startswith("method.")}
        return Config.of({**current, **values})

    def flat(self) -> dict[str, Any]:
        """The values by dotted key."""
        return flatten(self.nested())

    def changed(self) -> dict[str, Any]:
        """The values that differ from the defaults, by dotted key; enough for ``of``."""
        defaults = Config(method=method_options(self.method.name)).flat()
        defaults["method.name"] = METHOD
        return {key: value for key, value in self.flat().items() if value != defaults[key]}

    def nested(self) -> dict[str, Any]:
        """The values as nested tables, ready for TOML."""
        return self.model_dump(by_alias=True)


SECTIONS: dict[str, type[Options]] = {
    name: info.annotation
    for name, info in Config.model_fields.items()
    if isinstance(info.annotation, type) and issubclass(info.annotation, Options)
}
del SECTIONS["method"]  # its options depend on the method, whose file would be imported


def _keys() -> dict[str, FieldInfo]:
    name = FieldInfo(annotation=str, default=METHOD, description=", ".join(METHODS))
    found = {"method.name": name}
    models: dict[str, type[Options]] = {"": sections.Run, **SECTIONS}
    for section, model in models.items():
        prefix = f"{section}." if section else ""
        found |= {prefix + kebab_case(field): info for field, info in model.model_fields.items()}
    return found


# Every key but the methods' options: its default, annotation, description and bounds.
KEYS: dict[str, FieldInfo] = _keys()


@cache
def all_keys() -> dict[str, FieldInfo]:
    """``KEYS`` and the options of every method, whose files are imported."""
    found = dict(KEYS)
    for name in METHODS:
        for field, info in method_class(name).Options.model_fields.items():
            found.setdefault(f"method.{kebab_case(field)}", info)
    return found


def _checked(model: type[Model], given: Mapping[str, Any], prefix: str = "") -> Model:
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise UserError(in_a_sentence(error, model, prefix)) from None


def _unknown(key: str) -> UserError:
    listing = "`flexlora simulate --help-config` lists all keys"
    return UserError(f"unknown key '{key}'.{nearest(key, all_keys())} {listing}.")


def _parsed(key: str, text: str) -> Scalar:
    """The value of ``--set key=text``; text of the wrong type is returned for ``of`` to refuse."""
    info = KEYS.get(key) or all_keys().get(key)
    if info is None:
        raise _unknown(key)
    if info.annotation is bool:
        return {"true": True, "false": False}.get(text.strip().lower(), text)
    if info.annotation in (int, float):
        try:
            return int(text) if info.annotation is int else float(text)
        except ValueError:
            return text
    return text


def of_flower(run_config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of Flower's run config, without method options at Flower's default ""."""
    return {
        key: value
        for key, value in run_config.items()
        if value != "" or key in KEYS or not key.startswith("method.")
    }


def flower_table() -> dict[str, Any]:
    """``[tool.flwr.app.config]``, with every key that Flower may override.

    Options of methods are "" (not given), since their defaults depend on the method.
    """
    table: dict[str, Any] = {}
    for key, info in all_keys().items():
        section, _, leaf = key.rpartition(".")
        default = info.default if key in KEYS else ""
        (table.setdefault(section, {}) if section else table)[leaf] = default
    return table


def of_older(values: Mapping[str, Any]) -> dict[str, Any]:
    """A run folder's configuration without options that had no effect in an older version.

    Older versions wrote the options of all methods: those that the run's method lacks and that are
    at their default, and ``RETIRED`` ones, are left out.
    """
    options = method_class(str(values.get("method.name", METHOD))).Options.option_names()
    known = all_keys()

    def has_no_effect(key: str, value: object) -> bool:
        if key in RETIRED and value == RETIRED[key]:
            return True
        leaf = key.removeprefix("method.")
        foreign = leaf != key and leaf not in options and key in known
        return foreign and value == known[key].default

    return {key: value for key, value in values.items() if not has_no_effect(key, value)}


def resolved(config: Config) -> Config:
    """The configuration with ``engine.threads`` set from the cores that are free, where it is 0.

    It decides the order of sums, and so the last bits: a run folder's configuration has it.
    """
    threads = config.engine.threads or max(1, free_cores() // config.engine.workers)
    return config.with_values({"engine.threads": threads})


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested TOML tables as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def read_toml(path: str | Path) -> dict[str, Any]:
    """Dotted keys of a TOML file.

    Raises:
        UserError: the file is missing, is not TOML, or its text is not UTF-8.
    """
    try:
        return flatten(tomllib.loads(read_text(path, "configuration file")))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"configuration file '{path}' cannot be read: {error}.") from None
