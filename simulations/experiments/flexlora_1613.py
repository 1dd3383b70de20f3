"""``flexlora reproduce flexlora-1613``: the federation of the paper's size, on the user's data.

``scenarios/flexlora-1613.toml``: 1,613 clients of one Natural Instructions task each, ranks dealt
as in the paper's heavy-tail-light (arXiv 2402.11505, section 4); at least 80 of them a round, also
where the base is too short for the rows of some. The run must complete, lose no client, lower the
loss, and not grow in memory over the rounds. An interrupted run is resumed from its checkpoint.
"""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import psutil
from rich.console import Console

from flexlora.config.resolve import Config, resolved
from flexlora.errors import UserError
from flexlora.runs.folder import RunFolder
from flexlora.server.members.roster import Roster
from flexlora.simulations.experiments.checks import Check, print_verdict
from flexlora.simulations.experiments.request import Request, scaled
from flexlora.simulations.simulate import resume, simulate
from flexlora.simulations.terminal import TerminalObserver

__all__ = ["CLIENTS", "Witness", "checks_of", "flexlora_1613"]

SCENARIO = Path(__file__).parents[1] / "scenarios" / "flexlora-1613.toml"
CLIENTS, A_ROUND = 1613, 80
LEARNED = 1.5  # by how much the loss on held-out rows falls at least, in nats
GROWTH = 1.1  # the resident set in the last half of the rounds over that in the rounds before
LEFT_OUT = "left out"


def flexlora_1613(request: Request) -> int:
    """One run per seed, and the verdict on its figures.

    Raises:
        UserError: no data folder, or a key that the experiment sets.
    """
    if not request.given.get("data.path"):
        raise UserError(
            f"'{request.name}' got no data folder, expected one with rows of 1,613 clients; "
            "give it with --set data.path=DIR."
        )
    request.refuse_taken(["seed"])
    results, checks = request.results(), []
    for seed in request.seeds:
        config = config_of(request, seed)
        if not results.has(request.name, seed):
            results.add(request.name, seed, _run(request, config, request.out / "runs" / str(seed)))
        (row,) = results.of_seeds([seed])
        checks += checks_of(row, clients=config.clients.count or CLIENTS)
    request.console.print(f"Numbers: {results.file}", soft_wrap=True)
    return print_verdict(checks, request.console, scale=request.scale)


def config_of(request: Request, seed: int) -> Config:
    """The scenario at this scale, with the values of ``--set``."""
    scenario = Config.resolve(file=SCENARIO)
    sizes = request.sizes(rounds=scenario.num_server_rounds, clients=CLIENTS)
    least = {"min-train-clients": scaled(A_ROUND, request.scale)}
    return resolved(Config.of({**scenario.flat(), **sizes, **least, **request.given, "seed": seed}))


def _run(request: Request, config: Config, out: Path) -> dict[str, object]:
    """Start the run, or resume an unfinished one of the same configuration."""
    notes = request.out / f"memory-{out.name}.jsonl"
    with Witness(request.console, notes) as witness:
        if _unfinished(out, config):
            resume(out, observer=witness)
        else:
            notes.unlink(missing_ok=True)
            simulate(config, out, observer=witness, overwrite=True)
    return figures_of(RunFolder(out), witness)


def _unfinished(out: Path, config: Config) -> bool:
    """Whether ``out`` holds a checkpoint of a run of this configuration.

    ``engine.*`` may differ: it depends on the machine and does not change the results.
    """
    if not RunFolder.is_run(out) or not (out / "checkpoint" / "current.json").is_file():
        return False
    begun = RunFolder.open(out)[1]
    compared = [key for key in config.flat() if key != "out" and not key.startswith("engine.")]
    before, now = begun.flat(), config.flat()
    return all(before.get(key) == now[key] for key in compared)


class Witness(TerminalObserver):
    """Also records the roster, and the resident set size after each round.

    ``notes``: a file, so that a resumed run has the sizes of its earlier rounds.
    """

    def __init__(self, console: Console, notes: Path) -> None:
        super().__init__(console)
        self.notes = notes
        self.roster = Roster()

    def met(self, roster: Roster) -> None:
        self.roster = roster
        super().met(roster)

    def round_finished(self, metrics: Mapping[str, object]) -> None:
        note = {"round": metrics["round"], "bytes": psutil.Process().memory_info().rss}
        with self.notes.open("a", encoding="utf-8") as file:
            file.write(json.dumps(note) + "\n")
        super().round_finished(metrics)

    def resident_bytes(self) -> list[int]:
        """After each training round, in order."""
        lines = self.notes.read_text(encoding="utf-8").splitlines()
        notes = {note["round"]: note["bytes"] for note in map(json.loads, lines)}
        return [notes[server_round] for server_round in sorted(notes) if server_round > 0]


def figures_of(run: RunFolder, witness: Witness) -> dict[str, object]:
    """The figures that ``checks_of`` reads, from the run folder and the observer."""
    roster, config = witness.roster, RunFolder.open(run.path)[1]
    share = round(config.fraction_train * len(roster.members))
    rows = run.metrics()
    trained = [row for row in rows if row["round"] > 0]
    with (run.path / "clients.csv").open(encoding="utf-8", newline="") as file:
        named = [row for row in csv.DictReader(file) if row["status"] == LEFT_OUT and row["cause"]]
    causes = Counter(cause.split(":")[0] for cause in roster.left_out.values())
    losses = [row["eval_loss"] for row in rows if row.get("eval_loss") is not None]
    return {
        "rounds": len(trained),
        "rounds requested": config.num_server_rounds,
        "clients": len(roster.members),
        "left out": len(roster.left_out),
        "left out in clients.csv": len(named),
        "without train rows": causes.get("no train rows", 0),
        "clients a round requested": max(config.min_train_clients, share),
        "clients a round": [row["clients_ok"] for row in trained],
        "loss of the base": losses[0] if losses else None,
        "loss": losses[-1] if len(losses) > 1 else None,
        "resident bytes": witness.resident_bytes(),
        "seconds": sum(row["seconds"] for row in rows),
    }


def checks_of(row: Mapping, *, clients: int) -> list[Check]:
    """The verdict on one seed; counts must be exact at any scale."""
    who = f"seed {row['seed']}"
    known = row["clients"] + row["left out"]
    named, without = row["left out in clients.csv"], row["without train rows"]
    fewest = min(row["clients a round"], default=0)
    counts = (
        ("rounds completed", row["rounds requested"], row["rounds"]),
        ("clients known", clients, known),
        ("clients left out with their cause in clients.csv", row["left out"], named),
        ("updates counted in the round with fewest", row["clients a round requested"], fewest),
    )
    checks = [
        Check(claim=f"{who}: {what}", expected=expected, seen=seen, any_scale=True)
        for what, expected, seen in counts
    ]
    fallen = (row["loss of the base"] or math.nan) - (row["loss"] or math.nan)
    return [
        *checks,
        Check(
            claim=f"{who}: clients without train rows, skipped and counted",
            expected=1,
            seen=without,
            sense="at least",
        ),
        Check(
            claim=f"{who}: held-out loss falls by",
            expected=LEARNED,
            seen=fallen,
            sense="at least",
        ),
        Check(
            claim=f"{who}: memory in the last half of the rounds over that before",
            expected=GROWTH,
            seen=_growth(row["resident bytes"]),
            sense="at most",
        ),
    ]


def _growth(resident: list[int]) -> float:
    """The mean of the last half over the mean of the first, without round 1."""
    later = resident[1:]
    half = len(later) // 2
    if not half:
        return float("nan")
    return statistics.fmean(later[half:]) / statistics.fmean(later[:half])
