"""``RUN/canaries.json``: the canaries of an audited run, and their scores by round.

    {"secret", "norm", "num_examples", "share", "classes": {client_id: rank class},
     "rounds": {round: {"weight", "scores": [in the order of classes]}}}

It is replaced whole before the checkpoint of each round. Rounds that have no checkpoint yet are
computed again by a resume, which replaces them here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexlora.errors import UserError
from flexlora.privacy.canaries import Canaries
from flexlora.wire.files import write_atomically

__all__ = ["CANARY_FILE", "CanaryRecord"]

CANARY_FILE = "canaries.json"


@dataclass(kw_only=True)
class CanaryRecord:
    """The canaries, the chance ``share`` to be sampled in a round, and what was measured.

    ``rounds`` has, by round, the weight of one client's change and the score of each canary in the
    order of ``classes``.
    """

    canaries: Canaries
    share: float
    classes: dict[str, str] = field(default_factory=dict)
    rounds: dict[int, tuple[float, Sequence[float]]] = field(default_factory=dict)

    @property
    def included(self) -> list[bool]:
        return [self.canaries.included(client_id) for client_id in self.classes]

    def until(self, last_round: int) -> CanaryRecord:
        """Without the rounds after ``last_round``."""
        kept = {at: row for at, row in self.rounds.items() if at <= last_round}
        return CanaryRecord(
            canaries=self.canaries, share=self.share, classes=self.classes, rounds=kept
        )

    def write(self, run: Path) -> None:
        """
        Raises:
            OSError: it cannot be written.
        """
        values: dict[str, Any] = {
            **{name: value for name, value in vars(self.canaries).items() if name != "count"},
            "share": self.share,
            "classes": self.classes,
            "rounds": {
                str(at): {"weight": weight, "scores": list(scores)}
                for at, (weight, scores) in sorted(self.rounds.items())
            },
        }
        write_atomically(run / CANARY_FILE, json.dumps(values).encode() + b"\n")

    @classmethod
    def read(cls, run: Path) -> CanaryRecord | None:
        """The record of the run in ``run``; None without canaries.

        Raises:
            UserError: the file is damaged.
        """
        file = run / CANARY_FILE
        if not file.is_file():
            return None
        try:
            return cls._of(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"'{file}' is damaged ({type(error).__name__}: {error}); it cannot be made again "
                "without running the federation again."
            ) from None

    @classmethod
    def _of(cls, values: Mapping[str, Any]) -> CanaryRecord:
        classes = {str(k): str(v) for k, v in values["classes"].items()}
        rounds: dict[int, tuple[float, Sequence[float]]] = {
            int(at): (float(row["weight"]), [float(score) for score in row["scores"]])
            for at, row in values["rounds"].items()
        }
        if any(len(scores) != len(classes) for _, scores in rounds.values()):
            raise ValueError(f"a round has another number of scores than {len(classes)} canaries")
        canaries = Canaries(
            secret=int(values["secret"]),
            count=len(classes),
            norm=float(values["norm"]),
            num_examples=int(values["num_examples"]),
        )
        return cls(canaries=canaries, share=float(values["share"]), classes=classes, rounds=rounds)
