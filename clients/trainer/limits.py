"""What the node's owner allows: ``flexlora client serve --limits limits.toml``.

A run asks for steps, batches, lengths and ranks in its configuration; this file bounds them, under
the names that they have there. A request beyond a limit is refused in one sentence before any of
its bytes are received. Limits that the file does not name, and a trainer without a file, have the
defaults here: far above what trainings take, and finite.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flexlora.aggregation.engine.options import Options, in_a_sentence, kebab_case, option
from flexlora.clients.trainer.hours import Hours
from flexlora.config.resolve import read_toml
from flexlora.errors import UserError, nearest
from flexlora.units import parse_bytes

__all__ = ["OwnerLimits", "PrivacyLimits", "QuotaLimits", "limits_text"]

DAY, WEEK = 86400.0, 7 * 86400.0


class RequestLimits(Options):
    """Every request: training, evaluation and what is received for them."""

    hours: str = option(
        "", "local time in which to work, like '22:00-06:00, 12:00-13:00' (empty: all)"
    )
    seconds: float = option(
        21600.0, "of one request; what takes longer is ended and counts for nothing", gt=0.0
    )
    memory: str = option("", "bytes to use, like '6GiB' (empty: what is free)")
    rank: int = option(1024, "of the factors that are trained", ge=1)
    carried_rank: int = option(65536, "of the frozen factors beside them", ge=0)
    gradient_batches: int = option(1000, "batches before the first step (method aligned)", ge=0)
    adapters: int = option(1000, "scored by one evaluation", ge=1)


class TrainLimits(Options):
    """Local training; epochs count as the steps that they make of the rows here."""

    max_steps: int = option(100_000, "optimizer steps of a round", ge=1)
    per_device_train_batch_size: int = option(1024, "rows in one pass", ge=1)
    gradient_accumulation_steps: int = option(1024, "passes per step", ge=1)
    max_length: int = option(32768, "tokens of prompt and answer", ge=8)


class EvalLimits(Options):
    """Evaluation on this node's held-out rows."""

    max_examples: int = option(100_000, "rows that are scored", ge=0)
    max_new_tokens: int = option(4096, "tokens generated per answer", ge=1)
    batch_size: int = option(4096, "rows in one pass", ge=1)


class PersonalLimits(Options):
    """Personal factors, which stay on this node."""

    rank: int = option(1024, "of personal factors (0: none are trained here)", ge=0)
    max_steps: int = option(100_000, "steps of a round on them", ge=1)


class DataLimits(Options):
    """The rows that any run may use; the same ones in every run."""

    share: float = option(1.0, "share of the rows of each split", gt=0.0, le=1.0)
    max_examples: int = option(0, "rows of each split at most (0: all)", ge=0)


class QuotaLimits(Options):
    """What all requests together may take, over any span of that length."""

    seconds: float = option(DAY, "of training and evaluation", ge=0.0)
    requests: int = option(20_000, "trainings and evaluations", ge=0)
    rows: int = option(50_000_000, "that pass through training, each as often as it does", ge=0)


class DayLimits(QuotaLimits):
    """Quotas over any 24 hours."""


class WeekLimits(QuotaLimits):
    """Quotas over any 7 days."""

    seconds: float = option(WEEK, "of training and evaluation", ge=0.0)
    requests: int = option(140_000, "trainings and evaluations", ge=0)
    rows: int = option(350_000_000, "that pass through training, each as often as it does", ge=0)


class PrivacyLimits(Options):
    """What uploads may reveal, over all runs; a limit refuses trainings without such noise."""

    epsilon: float = option(0.0, "of all rows together: privacy.mode=local (0: no bound)", ge=0.0)
    example_epsilon: float = option(
        0.0, "of any one row: privacy.mode=example or local (0: no bound)", ge=0.0
    )
    delta: float = option(1e-5, "chance at which these may fail", gt=0.0, le=0.5)


class FileLimits(Options):
    """Personal factors and what int8 uploads rounded away, a folder for each run."""

    max_bytes: str = option("10GiB", "of all runs; the runs that are oldest go first")
    days: float = option(90.0, "after which a run's files go", gt=0.0)


class OwnerLimits(Options):
    """All sections; ``OwnerLimits()`` are the defaults."""

    request: RequestLimits = RequestLimits()
    train: TrainLimits = TrainLimits()
    eval: EvalLimits = EvalLimits()
    personal: PersonalLimits = PersonalLimits()
    data: DataLimits = DataLimits()
    day: DayLimits = DayLimits()
    week: WeekLimits = WeekLimits()
    privacy: PrivacyLimits = PrivacyLimits()
    files: FileLimits = FileLimits()

    @classmethod
    def read(cls, path: str | Path) -> OwnerLimits:
        """The limits in a TOML file.

        Raises:
            UserError: a file that is missing or not TOML, an unknown key (with the nearest known
                one), a value of the wrong type or out of range.
        """
        tree: dict[str, dict[str, Any]] = {}
        known = list(keys())
        for key, value in read_toml(path).items():
            section, _, leaf = key.rpartition(".")
            if key not in known:
                raise UserError(f"'{path}': unknown key '{key}'.{nearest(key, known)}")
            tree.setdefault(section, {})[leaf] = value
        try:
            made: dict[str, Any] = {name: _checked(name, given) for name, given in tree.items()}
        except UserError as error:
            raise UserError(f"'{path}': {error}") from None
        return cls(**made)

    def flat(self) -> dict[str, Any]:
        """The values by dotted key."""
        return {
            f"{section}.{kebab_case(field)}": value
            for section, model in self
            for field, value in model
        }


SECTIONS: dict[str, type[Options]] = {
    name: type(info.default) for name, info in OwnerLimits.model_fields.items()
}


def keys() -> Iterator[str]:
    """Every dotted key."""
    for section, model in SECTIONS.items():
        yield from (f"{section}.{name}" for name in model.option_names())


def _checked(section: str, given: dict[str, Any]) -> Options:
    model = SECTIONS[section]
    try:
        made = model.model_validate(given)
    except ValidationError as error:
        raise UserError(in_a_sentence(error, model, f"{section}.")) from None
    if isinstance(made, RequestLimits):
        Hours.parse(made.hours, "request.hours")
        if made.memory:
            parse_bytes(made.memory, "request.memory")
    if isinstance(made, FileLimits):
        parse_bytes(made.max_bytes, "files.max-bytes")
    return made


def limits_text(*, memory: str = "") -> str:
    """A file in which every limit stands at its default behind a ``#``, with a line of help.

    ``memory`` is set.
    """
    lines = [
        "# What a run may ask of this node: its server asks, this file allows. A request beyond",
        "# it is refused in one sentence, which the server finds in its clients.csv. Take a # away",
        "# to set a limit; the values are the defaults. The trainer reads the file when it starts;",
        "# how much of the quotas is used, `flexlora client health` shows.",
    ]
    for section, model in SECTIONS.items():
        lines += ["", f"# {model.__doc__}", f"[{section}]"]
        for field, info in model.model_fields.items():
            given = memory if (section, field) == ("request", "memory") else ""
            value = f'"{given}"' if given else _spelled(info.default)
            setting = f"{kebab_case(field)} = {value}"
            lines.append(f"{'' if given else '# '}{setting:<40} # {info.description}")
    return "\n".join(lines) + "\n"


def _spelled(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
