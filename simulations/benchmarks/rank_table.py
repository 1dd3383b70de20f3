"""How much LoRA rank each family of the built-in tasks needs: one family, six ranks, one table.

    python -m flexlora.simulations.benchmarks.rank_table --json rank_table.json

Every family is learned by itself from the embedded base, at ranks 1 to 32 side by side as six slots
of one cohort: the same rows, batches and scaling, so that ranks differ in capacity alone. A cell is
exact match of greedy generation on test rows, at the learning rate of ``--rates`` that was best for
that rank on validation rows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from flexlora.aggregation import make_method
from flexlora.aggregation.engine.starts import Factoring
from flexlora.aggregation.engine.state import GlobalChange, State
from flexlora.data.collation import Example, encode_rows
from flexlora.data.tasks import FAMILIES, choose_families, generate_rows
from flexlora.evaluation.generation import generate_answers
from flexlora.evaluation.text_scores import exact_match
from flexlora.lora.adapters import Adapter
from flexlora.lora.ranks import RankClass
from flexlora.report.console import make_console
from flexlora.training.local import TrainSettings, train
from flexlora.training.models import BaseModel, load_base
from flexlora.training.slots import SlotModel, slot_model
from flexlora.wire.jobs import TrainJob

__all__ = ["RANKS", "family_row", "main"]

RANKS = (1, 2, 4, 8, 16, 32)
ROWS = {"train": 1000, "validation": 60, "test": 100}
SCALING = 2.0


def family_row(
    base: BaseModel, family: str, *, steps: int, rates: Sequence[float], seed: int
) -> dict[str, object]:
    """Exact match of the base and of every rank on the test rows of one family."""
    slots = slot_model(base.model, "all-linear")
    examples = {split: _examples(base, family, split, seed) for split in ROWS}
    slots.clear()
    (bare,) = _scores(slots, base, examples["test"])
    best = dict.fromkeys(RANKS, (-1.0, 0.0, 0.0))  # validation, test, rate
    for rate in rates:
        adapters = _tuned(slots, base, examples["train"], steps=steps, rate=rate, seed=seed)
        slots.load(adapters)
        validation = _scores(slots, base, examples["validation"])
        test = _scores(slots, base, examples["test"])
        for rank, chosen_by, score in zip(RANKS, validation, test, strict=True):
            best[rank] = max(best[rank], (chosen_by, score, rate), key=lambda item: item[0])
    slots.clear()
    row: dict[str, object] = {"name": family, "half": FAMILIES[family].half, "base": bare}
    row |= {f"rank_{rank}": best[rank][1] for rank in RANKS}
    return row | {"rates": {f"rank_{rank}": best[rank][2] for rank in RANKS}}


def _examples(base: BaseModel, family: str, split: str, seed: int) -> list[Example]:
    rows = generate_rows(family, split, ROWS[split], seed)
    return encode_rows(rows, tokenizer=base.tokenizer, template="auto", max_length=128)[0]


def _tuned(
    slots: SlotModel,
    base: BaseModel,
    examples: list[Example],
    *,
    steps: int,
    rate: float,
    seed: int,
) -> list[Adapter]:
    """The adapters of all ranks after ``steps`` of 8 rows, trained as one cohort."""
    state, method = State(round=0, change=GlobalChange.zero(slots.shapes)), make_method("flexlora")
    jobs = [
        TrainJob(
            client_id="pooled",  # one name: the same batches for every rank
            server_round=1,
            num_server_rounds=1,
            start=method.start(
                state,
                RankClass(name=f"rank_{rank}", rank=rank),
                Factoring(alpha=SCALING * rank, seed=seed),
            ).sealed(),
        )
        for rank in RANKS
    ]
    settings = TrainSettings(learning_rate=rate, max_steps=steps, seed=seed)
    results = train(slots, jobs, [examples] * len(jobs), settings, pad_token_id=base.pad_token_id)
    return [r.adapter or job.start.trained for r, job in zip(results, jobs, strict=True)]


def _scores(slots: SlotModel, base: BaseModel, examples: list[Example]) -> list[float]:
    """Exact match of every loaded slot (or of the base) by greedy generation."""
    answers = generate_answers(
        slots,
        [examples] * max(slots.num_slots, 1),
        tokenizer=base.tokenizer,
        max_new_tokens=16,
        batch_size=240,
        pad_token_id=base.pad_token_id,
    )
    pairs = [zip(texts, examples, strict=True) for texts in answers]
    return [sum(exact_match(t, e.answer) for t, e in pair) / len(examples) for pair in pairs]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, family by family, and write it with ``--json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", default="all", help="families: default, all, or names")
    parser.add_argument("--steps", type=int, default=150, help="steps of 8 rows")
    parser.add_argument("--rates", default="2e-3,5e-3", help="learning rates to choose from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args(arguments)
    base, console = load_base("embedded", device="cpu"), make_console()
    rates = [float(rate) for rate in options.rates.split(",")]
    table = Table(box=None, pad_edge=False)
    columns = ["base", *(f"rank_{rank}" for rank in RANKS)]
    for column in ("family", "half", *columns):
        table.add_column(column, justify="left" if column in ("family", "half") else "right")
    rows = []
    for family in choose_families(options.tasks):
        row = family_row(base, family.name, steps=options.steps, rates=rates, seed=options.seed)
        rows.append(row)
        table.add_row(family.name, family.half, *(f"{row[c]:.2f}" for c in columns))
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    console.print(table)


if __name__ == "__main__":
    main()
