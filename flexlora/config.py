"""Every option once: its key, its default, what it accepts, one line of help.

Keys are dotted and kebab-case, the same in a TOML file, in ``--set key=value`` and in
``flwr run --run-config``. A configuration is resolved once at each entry point; the functions below
the entry points take plain values.
"""

from __future__ import annotations

import math
import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexlora.errors import UserError, nearest

__all__ = ["OPTIONS", "Config", "Option", "Scalar", "flatten", "read_toml", "resolved"]

Scalar = bool | int | float | str
QUANTIZATIONS = ("none", "8bit", "nf4")
RANK_POLICIES = (
    "fixed",
    "tiers",
    "paper:uniform",
    "paper:heavy-tail-light",
    "paper:heavy-tail-strong",
    "paper:normal",
    "file",
    "memory",
)


@dataclass(frozen=True, kw_only=True)
class Option:
    """One key. ``minimum`` and ``maximum`` are inclusive; the type is the default's type."""

    key: str
    default: Scalar
    help: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None

    @property
    def type_name(self) -> str:
        names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        return names[type(self.default)]

    def parse(self, text: str) -> Scalar:
        """The value of ``--set key=text``."""
        try:
            if isinstance(self.default, bool):
                return {"true": True, "false": False}[text.strip().lower()]
            if isinstance(self.default, int):
                return self.check(int(text))
            if isinstance(self.default, float):
                return self.check(float(text))
        except (KeyError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{self.key} is '{text}', expected {self.type_name}.") from None
        return self.check(text)

    def check(self, value: Any) -> Any:
        """``value`` in this option's type and range, or a ``UserError``."""
        if isinstance(self.default, float) and type(value) is int:
            value = float(value)
        if type(value) is not type(self.default):
            raise UserError(f"{self.key} is {value!r}, expected {self.type_name}.")
        if self.choices and value not in self.choices:
            known = ", ".join(choice or "nothing" for choice in self.choices)
            hint = nearest(str(value), self.choices)
            raise UserError(f"{self.key} is '{value}', expected one of {known}.{hint}")
        if self.minimum is not None and not float(value) >= self.minimum:
            raise UserError(f"{self.key} is {value}, expected at least {self.minimum:g}.")
        if self.maximum is not None and not float(value) <= self.maximum:
            raise UserError(f"{self.key} is {value}, expected at most {self.maximum:g}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{self.key} is {value}, expected a finite number.")
        return value


def _options() -> tuple[Option, ...]:
    def option(key, default, help, choices=(), minimum=None, maximum=None):
        return Option(
            key=key, default=default, help=help, choices=choices, minimum=minimum, maximum=maximum
        )

    return (
        option("seed", 0, "seed of every random draw", minimum=0),
        option("num-server-rounds", 8, "rounds of federated training", minimum=1),
        option("fraction-train", 0.34, "share of the clients that train in a round", (), 0.0, 1.0),
        option("min-train-clients", 1, "train at least this many clients a round", minimum=1),
        option("clients.count", 0, "clients to make of the data (0: as many as it names)", (), 0),
        option(
            "clients.quantization",
            "",
            "shares of simulated clients on another base, as 'nf4:0.5' or 'nf4:0.25,8bit:0.25'",
        ),
        option(
            "method.name",
            "carried",
            "aligned, carried, fed-plora, fedex-lora, fedit, ffa-lora, flexlora, flora, florist, "
            "hetlora, raflora, rbla, residual, rolora, slora",
        ),
        option(
            "method.server-learning-rate",
            0.0,
            "step on the aggregate (0: the method's own: 2 for residual, carried, aligned; else 1)",
            minimum=0.0,
        ),
        option(
            "method.server-optimizer",
            "sgd",
            "how the server steps; novograd is Adam with one second moment per module",
            ("sgd", "momentum", "novograd"),
        ),
        option("method.server-momentum", 0.9, "momentum of the server's optimizer", (), 0.0, 0.999),
        option("method.server-max-rank", 256, "rank of G that is kept per module", minimum=1),
        option("method.error-feedback", False, "add what truncation drops to the next sum"),
        option("method.realign", False, "turn new factors towards those last sent (Procrustes)"),
        option("method.carried-rank", 32, "rank carried (carried, aligned, fed-plora)", minimum=1),
        option(
            "method.carried-dtype",
            "",
            "dtype of what is carried (carried, aligned; empty: wire.dtype)",
            ("", "float32", "bfloat16"),
        ),
        option("method.gradient-batches", 1, "batches to align with; 0: random (aligned)", (), 0),
        option("method.restarts", 0, "fresh aligned factors within a round (aligned)", minimum=0),
        option("method.energy-threshold", 0.95, "energy that is kept (florist)", (), 1e-6, 1.0),
        option("method.prune-factor", 0.75, "share kept by self-pruning (hetlora)", (), 0.0, 0.999),
        option("method.prune-penalty", 1e-3, "regulariser of the tail (hetlora)", minimum=0.0),
        option("method.sparse-rounds", 2, "rounds before the SVD start (slora)", minimum=0),
        option(
            "method.singular-values",
            "b-heavy",
            "which factor carries the singular values (carried, flexlora, raflora, residual)",
            ("b-heavy", "balanced", "a-heavy"),
        ),
        option("method.max-update-norm", 0.0, "refuse larger updates (0: no bound)", minimum=0.0),
        option("ranks.policy", "tiers", "who trains at which rank", RANK_POLICIES),
        option("ranks.fixed", 8, "the rank under ranks.policy=fixed"),
        option("ranks.tiers", "2,4,8,16", "the ranks under ranks.policy=tiers"),
        option("ranks.shares", "0.5,0.25,0.15,0.1", "share of the clients per tier (or 'equal')"),
        option("ranks.scale", 1.0, "factor on the ranks of ranks.policy=paper:...", minimum=1e-6),
        option("ranks.file", "", "ranks by client id under ranks.policy=file (.csv or .toml)"),
        option("lora.alpha", 16.0, "LoRA's alpha; scaling is alpha/rank", minimum=1e-9),
        option("lora.rslora", False, "scaling is alpha/sqrt(rank)"),
        option("lora.dropout", 0.0, "dropout on the input of lora_A", (), 0.0, 0.99),
        option(
            "lora.target-modules",
            "all-linear",
            "all-linear, names separated by commas, or a regular expression",
        ),
        option("model.name", "embedded", "local folder or hub name of the base model"),
        option("model.quantization", "none", "how the base is held", QUANTIZATIONS),
        option(
            "model.outlier-threshold",
            0.0,
            "8bit: inputs beyond it are multiplied in 16 bits, one client at a time (0: none)",
            minimum=0.0,
        ),
        option("model.dtype", "float32", "dtype of the base", ("float32", "bfloat16", "float64")),
        option("data.path", "", "folder of train, validation and test .jsonl[.gz] files"),
        option("data.tasks", "default", "built-in families: default, all, or names with commas"),
        option("data.name", "", "hub data set (needs the datasets package)"),
        option(
            "data.partition", "client", "rows to clients", ("client", "task", "iid", "dirichlet")
        ),
        option("data.dirichlet-alpha", 0.5, "concentration of the Dirichlet partition", (), 1e-6),
        option("data.template", "auto", "prompt template (auto, plain, alpaca, chat)"),
        option("train.learning-rate", 5e-3, "peak learning rate", minimum=0.0),
        option("train.per-device-train-batch-size", 8, "rows of a client in one pass", minimum=1),
        option("train.gradient-accumulation-steps", 1, "passes per optimizer step", minimum=1),
        option("train.max-steps", 20, "optimizer steps a round (0: num-train-epochs)", minimum=0),
        option("train.num-train-epochs", 1, "epochs a round where max-steps is 0", minimum=1),
        option("train.max-length", 256, "tokens of prompt and answer together", minimum=8),
        option("train.optim", "adamw_torch", "local optimizer", ("adamw_torch", "sgd")),
        option("train.weight-decay", 0.0, "weight decay (decoupled in AdamW)", minimum=0.0),
        # Larger than the usual 1e-8: below it a gradient that is only float32
        # rounding would still move its weight by a whole step, in a direction of chance.
        option("train.adam-epsilon", 1e-6, "AdamW's epsilon", minimum=0.0),
        option("train.proximal-mu", 0.0, "FedProx: pull to where the round began", minimum=0.0),
        option("train.max-grad-norm", 1.0, "gradient norm bound per client (0: none)", minimum=0.0),
        option(
            "train.lr-scheduler-type",
            "linear",
            "learning rate across all rounds",
            ("constant", "linear", "cosine"),
        ),
        option("train.gradient-checkpointing", False, "recompute activations to save memory"),
        option("eval.every", 1, "evaluate the loss every N rounds (0: first and last)", minimum=0),
        option("eval.split", "validation", "rows to evaluate on", ("validation", "test")),
        option("eval.fraction", 1.0, "share of the clients that evaluate", (), 0.0, 1.0),
        option("eval.max-examples", 8, "rows per client (0: all)", minimum=0),
        option("eval.generate", "ends", "generated answers", ("never", "ends", "every")),
        option("eval.max-new-tokens", 24, "tokens generated per answer", minimum=1),
        option("eval.batch-size", 64, "rows per evaluation pass", minimum=1),
        option("engine.cohort-size", 8, "clients trained in one pass in simulation", minimum=1),
        option("engine.threads", 0, "CPU threads (0: all; fixed when the run starts)", minimum=0),
        option("engine.device", "auto", "where to train", ("auto", "cpu", "cuda")),
        option(
            "wire.dtype",
            "float32",
            "factors between server and client",
            ("float32", "bfloat16", "float64"),
        ),
        option("server.min-nodes", 1, "nodes to wait for before round 1", minimum=1),
        option("server.wait-seconds", 300.0, "how long to wait for them", minimum=0.0),
        option("server.round-timeout-seconds", 3600.0, "how long to wait for replies", minimum=0.1),
        option("server.late-rounds", 1, "rounds after which a late update still counts", minimum=0),
        option("out", "", "run folder of `flwr run` (default: runs/RUN_ID where the server runs)"),
    )


OPTIONS: dict[str, Option] = {option.key: option for option in _options()}


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
    """The configuration with what the machine decides written down: the number of threads."""
    available = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    return config.replace(engine__threads=config["engine.threads"] or len(available(0)))


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
