"""``results.json`` of an experiment, written after every run so that it can be resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flexlora.errors import UserError
from flexlora.wire.files import write_atomically

__all__ = ["ResultsFile"]


@dataclass(kw_only=True)
class ResultsFile:
    """The rows by variant and seed, and the losses and the choice of each variant's trials."""

    file: Path
    experiment: str
    given: dict[str, object]
    scale: float = 1.0
    rows: list[dict] = field(default_factory=list)
    trials: dict[str, dict] = field(default_factory=dict)

    @classmethod
    def read(
        cls, file: Path, experiment: str, given: Mapping[str, object], *, scale: float = 1.0
    ) -> ResultsFile:
        """The results of an earlier call, empty without a file.

        Raises:
            UserError: the file is damaged, of another experiment, or made with other ``--set`` or
                another ``--scale``.
        """
        results = cls(file=file, experiment=experiment, given=dict(given), scale=scale)
        if not file.is_file():
            return results
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
            made_with = saved["experiment"], saved["set"], saved.get("scale", 1.0)
            same = made_with == (experiment, dict(given), scale)
            results.rows = list(saved["rows"])
            results.trials = dict(saved.get("trials", {}))
        except (ValueError, KeyError, TypeError):
            raise UserError(f"'{file}' is damaged; remove it or give another --out.") from None
        if not same:
            raise UserError(
                f"'{file}' holds another experiment or other --set or --scale; give another --out."
            )
        return results

    def has(self, variant: str, seed: int) -> bool:
        return any((row["variant"], row["seed"]) == (variant, seed) for row in self.rows)

    def of_seeds(self, seeds: Sequence[int]) -> list[dict]:
        """The rows of these seeds; the file may hold more."""
        return [row for row in self.rows if row["seed"] in seeds]

    def add(self, variant: str, seed: int, scores: Mapping[str, object]) -> None:
        self.rows.append({"variant": variant, "seed": seed, **scores})
        self._write()

    def chosen(self, variant: str) -> dict[str, object]:
        """The best trial of a variant; empty where no trials were run."""
        return dict(self.trials[variant]["chosen"]) if variant in self.trials else {}

    def choose(
        self, variant: str, trials: Sequence[Mapping[str, object]], losses: Sequence[float]
    ) -> None:
        """Record all trials and choose the one with the lowest loss."""
        best = min(range(len(losses)), key=lambda i: losses[i])
        tried = [{**trial, "loss": loss} for trial, loss in zip(trials, losses, strict=True)]
        self.trials[variant] = {"chosen": dict(trials[best]), "tried": tried}
        self._write()

    def _write(self) -> None:
        values = {
            "experiment": self.experiment,
            "set": self.given,
            "scale": self.scale,
            "trials": self.trials,
            "rows": self.rows,
        }
        write_atomically(self.file, (json.dumps(values, indent=1) + "\n").encode())
