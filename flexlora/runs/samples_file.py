"""``samples.json``: answers to a few held-out prompts, and what a truncated ``T_r(G)`` is worth.

Written once, at the end of a simulation that generates answers or by ``flexlora report --samples``.
It holds rows of clients in plain text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flexlora.errors import UserError
from flexlora.wire.files import write_atomically

__all__ = ["SAMPLES_FILE", "Sample", "Samples", "TruncatedLoss", "read_samples", "write_samples"]

SAMPLES_FILE = "samples.json"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One held-out row of a client; ``answers`` by who gave them: base, global, personal."""

    client_id: str
    rank_class: str
    task: str
    prompt: str
    reference: str
    answers: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class TruncatedLoss:
    """Held-out loss of a class as it is served, and of ``T_r(G)`` at its trained rank alone."""

    served: float
    truncated: float


@dataclass(frozen=True, kw_only=True)
class Samples:
    """After ``round``, from the rows of ``split``; ``losses`` by rank class, over ``rows`` rows.

    ``losses`` is empty where every class is served its ``T_r(G)`` and nothing more.
    """

    round: int
    split: str
    samples: tuple[Sample, ...]
    rows: int = 0
    losses: Mapping[str, TruncatedLoss] = field(default_factory=dict)


def write_samples(folder: Path, samples: Samples) -> None:
    """Replace ``samples.json`` in a run folder."""
    text = json.dumps(asdict(samples), indent=1, ensure_ascii=False) + "\n"
    write_atomically(folder / SAMPLES_FILE, text.encode("utf-8", "replace"))


def read_samples(folder: Path, last_round: int) -> Samples | None:
    """The samples of a run; None if it has none, or those of a round that was rolled back.

    Raises:
        UserError: a file that ``write_samples`` has not written.
    """
    file = folder / SAMPLES_FILE
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_bytes().decode("utf-8", "replace"))
        samples = _of(found)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UserError(
            f"'{file}' is damaged: {error}; `flexlora report --samples` writes it anew."
        ) from None
    return samples if samples.round <= last_round else None


def _of(found: Mapping[str, Any]) -> Samples:
    samples = [_sample(row) for row in found["samples"]]
    losses = {
        str(name): TruncatedLoss(served=float(of["served"]), truncated=float(of["truncated"]))
        for name, of in found["losses"].items()
    }
    return Samples(
        round=int(found["round"]),
        split=str(found["split"]),
        samples=tuple(samples),
        rows=int(found["rows"]),
        losses=losses,
    )


def _sample(row: Mapping[str, Any]) -> Sample:
    texts = {name: str(row[name]) for name in ("client_id", "rank_class", "task")}
    texts |= {name: str(row[name]) for name in ("prompt", "reference")}
    return Sample(answers={str(k): str(v) for k, v in row["answers"].items()}, **texts)
