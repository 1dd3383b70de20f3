"""``flexlora reproduce hostile``: every attack against every robust rule, and what a rule costs.

Ten clients of four built-in tasks, one to three tasks each, seven at rank 2 and three at rank 8;
all train in every round and two of them are hostile. Loss and exact match are those of the honest
clients' test rows, each at its own rank class. A backdoor has its success too: the share of honest
test rows with the trigger that are answered with the target, by round and rank class, also after
the attackers have left.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from flexlora.data.poisoning import ATTACKS
from flexlora.simulations.experiments.checks import Check, print_verdict
from flexlora.simulations.experiments.hostile_runs import SHARE
from flexlora.simulations.experiments.request import ROUNDS, Request, scaled
from flexlora.simulations.experiments.variant_table import run_variants
from flexlora.simulations.experiments.variants import Variant

__all__ = ["RULES", "hostile_clients", "hostile_variants", "loss_table", "run_checks"]

CLEAN, PLAIN = "nobody hostile", "none"
RULES = (
    PLAIN,
    "nearest-trimmed-mean",
    "geometric-median",
    "multi-krum",
    "nearest-median",
    "centred-clipping",
)
SETTING: Mapping[str, object] = {
    "clients.count": 10,
    "data.tasks": "reverse_word,plural,past_tense,size_class",
    "fraction-train": 1.0,
    "ranks.tiers": "2,8",
    "ranks.shares": "0.7,0.3",
    "population.examples": "100",
    "train.max-steps": 6,
    "train.per-device-train-batch-size": 4,
    "train.learning-rate": 0.01,
    "server.late-rounds": 0,
}
MEASURED = {"eval.split": "test", "eval.max-examples": 10, "eval.every": 0, "eval.generate": "ends"}
NUM_ROUNDS = 5
# A backdoor whose attackers leave. Under `carried` all rank classes have nearly the same model,
# under the others each has the truncation of G at its rank.
LEAVING = "backdoor"
LEFT = ("residual", "flexlora", "carried")
ATTACKED_ROUNDS, LEFT_ROUNDS = 5, 8
WITHIN = 1.05  # of the loss without attack and without rule

Scores = Mapping[str, Any]


def hostile_variants(scale: float = 1.0) -> tuple[Variant, ...]:
    """No attack and each attack under every rule; a backdoor whose attackers leave, under none.

    Those without a rule and under the first one come first.
    """
    attacks = {CLEAN: "", **{attack: f"{attack}:{SHARE}" for attack in ATTACKS}}
    rounds = {ROUNDS: scaled(NUM_ROUNDS, scale, least=2)}
    table = [
        _variant(f"{title}, {rule}", {**rounds, "population.hostile": value, "robust.rule": rule})
        for rule in RULES
        for title, value in attacks.items()
    ]
    last = scaled(ATTACKED_ROUNDS, scale)
    rounds = {ROUNDS: scaled(LEFT_ROUNDS, scale, least=2)}
    left = [
        _variant(
            f"{LEAVING}, then gone, {method}",
            {**rounds, "population.hostile": f"{LEAVING}:{SHARE}:{last}", "method.name": method},
        )
        for method in LEFT
    ]
    first = 2 * len(attacks)  # without a rule and under the first one
    return tuple(table[:first] + left + table[first:])


def _variant(title: str, changes: Mapping[str, object]) -> Variant:
    return Variant(title=title, kind="hostile", changes={**SETTING, **changes})


def hostile_clients(request: Request) -> int:
    """Run the variants, print the tables and the verdict."""
    variants = hostile_variants(request.scale)
    results = run_variants(request, variants, MEASURED)
    rows = results.of_seeds(request.seeds)
    for table in (loss_table(rows), backdoor_table(rows)):
        request.console.print()
        request.console.print(table)
    request.console.print(f"Numbers: {results.file}", soft_wrap=True)
    return print_verdict(run_checks(rows), request.console, scale=request.scale)


def loss_table(rows: Sequence[Scores]) -> Table:
    """Loss and exact match of the honest clients' test rows, an attack a row, a rule a column."""
    table = Table(title="loss (exact match)", title_justify="left", box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for rule in RULES:
        table.add_column("no rule" if rule == PLAIN else rule, justify="right", no_wrap=True)
    for title in (CLEAN, *ATTACKS):
        cells = []
        for rule in RULES:
            loss, match = (_mean(rows, f"{title}, {rule}", k) for k in ("loss", "exact match"))
            cells.append("" if loss is None else f"{loss:.3f} ({match:.2f})")
        table.add_row(title, *cells)
    return table


def backdoor_table(rows: Sequence[Scores]) -> Table:
    """The backdoor's success by round and rank class."""
    table = Table(title="backdoor: success", title_justify="left", box=None, pad_edge=False)
    of_backdoors = [row for row in rows if row.get("rounds")]
    rounds = sorted({entry["round"] for row in of_backdoors for entry in row["rounds"]})
    for name in ("", "class", *map(str, rounds)):
        table.add_column(name, no_wrap=True)
    for title in dict.fromkeys(row["variant"] for row in of_backdoors):
        runs = [row["rounds"] for row in of_backdoors if row["variant"] == title]
        for name in [key for key in runs[0][0] if key != "round"]:
            table.add_row(title, name, *(f"{_success(runs, name, r):.2f}" for r in rounds))
            title = ""
    return table


def _success(runs: Sequence[Sequence[Scores]], name: str, server_round: int) -> float:
    entries = [entry for run in runs for entry in run if entry["round"] == server_round]
    return statistics.fmean(entry[name] for entry in entries)


def run_checks(rows: Sequence[Scores]) -> list[Check]:
    """For each attack the best rule's loss over that without attack and without rule."""
    clean = _mean(rows, f"{CLEAN}, {PLAIN}", "loss")
    checks = []
    for attack in ATTACKS:
        losses = {rule: _mean(rows, f"{attack}, {rule}", "loss") for rule in RULES}
        known = {rule: loss for rule, loss in losses.items() if loss is not None}
        if clean is None or not known:
            continue
        best = min(known, key=lambda rule: known[rule])
        claim = f"{attack}: loss over that without attack, under {best}"
        seen = known[best] / clean
        checks.append(Check(claim=claim, expected=WITHIN, seen=seen, sense="at most"))
    return checks


def _mean(rows: Sequence[Scores], title: str, key: str) -> float | None:
    values = [row[key] for row in rows if row["variant"] == title]
    return statistics.fmean(values) if values else None
