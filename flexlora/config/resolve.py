"""A configuration: every option of ``options.py`` with its value.

Keys are dotted and kebab-case, the same in a TOML file, in ``--set key=value`` and in
``flwr run --run-config``. A configuration is resolved once at each entry point; the functions below
the entry points take plain values.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flexlora.config.options import OPTIONS, Option, Scalar
from flexlora.errors import UserError, nearest

__all__ = ["OPTIONS", "Config", "Option", "Scalar", "flatten", "read_toml", "resolved"]


def _known(key: str) -> Option:
    if key not in OPTIONS:
        listing = "`flexlora simulate --help-config` lists all keys"
        raise UserError(f"unknown key '{key}'.{nearest(key, OPTIONS)} {listing}.")
    return OPTIONS[key]


class Config(Mapping[str, Any]):
    """All options resolved to values: immutable, complete, in the order of ``OPTIONS``."""

    def __init__(self, values: Mapping[str, object] | None = None) -> None:
        merged: dict[str, Scalar] = {key: option.default for key, option in OPTIONS.items()}
        for key, value in (values or {}).items():
            merged[key] = _known(key).check(value)
        self._values = merged

    @classmethod
    def resolve(cls, *, file: str | Path | None = None, sets: tuple[str, ...] = ()) -> Config:
        """Defaults, then the TOML ``file``, then each ``key=value`` of ``sets``.

        Raises:
            UserError: an unknown key (with the nearest known one), a value of the wrong type or
                out of range, a missing or malformed file, a ``--set`` without ``=``.
        """
        return cls(cls.given(file=file, sets=sets))

    @staticmethod
    def given(*, file: str | Path | None = None, sets: tuple[str, ...] = ()) -> dict[str, Any]:
        """What ``file`` and ``sets`` say and nothing else; see ``resolve``."""
        read = read_toml(file) if file else {}
        values = {key: _known(key).check(value) for key, value in read.items()}
        for item in sets:
            key, equals, text = item.partition("=")
            if not equals:
                raise UserError(f"--set got '{item}', expected key=value.")
            values[key.strip()] = _known(key.strip()).parse(text)
        return values

    def replace(self, **values: Scalar) -> Config:
        """A copy with other values; keyword names spell ``.`` as ``__`` and ``-`` as ``_``."""
        spelled = {key.replace("__", ".").replace("_", "-"): v for key, v in values.items()}
        return Config({**self._values, **spelled})

    def nested(self) -> dict[str, Any]:
        """The values as nested tables, ready for TOML."""
        tree: dict[str, Any] = {}
        for key, value in self._values.items():
            table, _, leaf = key.rpartition(".")
            (tree.setdefault(table, {}) if table else tree)[leaf] = value
        return tree

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        changed = {k: v for k, v in self._values.items() if v != OPTIONS[k].default}
        return f"Config({changed})"


def resolved(config: Config) -> Config:
    """The configuration with what the machine decides written down: the threads of each worker."""
    available = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    share = max(1, len(available(0)) // config["engine.workers"])
    return config.replace(engine__threads=config["engine.threads"] or share)


def flatten(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested TOML tables as dotted keys."""
    flat: dict[str, object] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def read_toml(path: str | Path) -> dict[str, object]:
    """Dotted keys of a TOML file.

    Raises:
        UserError: the file is missing or is not TOML.
    """
    try:
        return flatten(tomllib.loads(Path(path).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"configuration file '{path}' does not exist.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"configuration file '{path}' cannot be read: {error}.") from None
