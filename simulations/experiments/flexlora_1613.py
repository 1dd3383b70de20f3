"""``flexlora reproduce flexlora-1613``: the federation of the paper's size, on data of one's own.

``scenarios/flexlora-1613.toml``: 1,613 clients of one Natural Instructions task each, ranks dealt
as in the paper's heavy-tail-light (arXiv 2402.11505, section 4); at least 80 of them a round, also
where the base is too short for the rows of some. What is asked is that it completes, that nobody
is lost on the way, that it learns, and that memory does not grow with the rounds. A broken run
goes on from its checkpoint.
"""

from __future__ import annotations

import csv
import json
import statistics
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import psutil

from flexlora.config.resolve import Config, resolved
from flexlora.errors import UserError
from flexlora.runs.folder import RunFolder
from flexlora.server.members.roster import Roster
from flexlora.server.observing.observer import Observer
from flexlora.simulations.experiments.asked import Asked, scaled
from flexlora.simulations.experiments.verdicts import Check, tell
from flexlora.simulations.simulate import resume, simulate
from flexlora.simulations.terminal import TerminalObserver

__all__ = ["CLIENTS", "Witness", "checks_of", "flexlora_1613"]

SCENARIO = Path(__file__).parents[1] / "scenarios" / "flexlora-1613.toml"
CLIENTS, A_ROUND = 1613, 80
LEARNED = 1.5  # by how much the loss on held-out rows falls at least, in nats
GROWTH = 1.1  # the resident set in the last half of the rounds over that in the rounds before
LEFT_OUT = "left out"


def flexlora_1613(asked: Asked) -> int:
    """One run per seed, its figures, and the verdict on each.

    Raises:
        UserError: no data folder, or a key that the experiment decides.
    """
    if not asked.given.get("data.path"):
        raise UserError(
            f"'{asked.name}' got no data folder, expected one with rows of 1,613 clients; give it "
            "with --set data.path=DIR."
        )
    asked.refuse_taken(["seed"])
    kept, checks = asked.kept(), []
    for seed in asked.seeds:
        config = config_of(asked, seed)
        if not kept.has(asked.name, seed):
            kept.add(asked.name, seed, _run(asked, config, asked.out / "runs" / str(seed)))
        (row,) = kept.of_seeds([seed])
        checks += checks_of(row, clients=config.clients.count or CLIENTS)
    asked.console.print(f"Numbers: {kept.file}", soft_wrap=True)
    return tell(checks, asked.console, scale=asked.scale)


def config_of(asked: Asked, seed: int) -> Config:
    """The scenario at this scale, with what was given."""
    scenario = Config.resolve(file=SCENARIO)
    sizes = asked.sizes(rounds=scenario.num_server_rounds, clients=CLIENTS)
    least = {"min-train-clients": scaled(A_ROUND, asked.scale)}
    return resolved(Config.of({**scenario.flat(), **sizes, **least, **asked.given, "seed": seed}))


def _run(asked: Asked, config: Config, out: Path) -> dict[str, object]:
    """Begin the run, or go on with the same one after its last whole round."""
    notes = asked.out / f"memory-{out.name}.jsonl"
    with TerminalObserver(asked.console) as terminal:
        witness = Witness(terminal, notes)
        if _unfinished(out, config):
            resume(out, observer=witness)
        else:
            notes.unlink(missing_ok=True)
            simulate(config, out, observer=witness, overwrite=True)
    return figures_of(RunFolder(out), witness)


def _unfinished(out: Path, config: Config) -> bool:
    """Whether ``out`` holds a run of this very configuration with a whole round behind it.

    ``engine.*`` is how it is run, which the machine has a say in, and not what is run.
    """
    if not RunFolder.is_run(out) or not (out / "checkpoint" / "current.json").is_file():
        return False
    begun = RunFolder.open(out)[1]
    own = [key for key in config.flat() if key != "out" and not key.startswith("engine.")]
    before, now = begun.flat(), config.flat()
    return all(before.get(key) == now[key] for key in own)


class Witness:
    """Tells everything on; keeps the roster, and the resident set after each round in ``notes``.

    Implements ``Observer``. Notes outlive the process, as the run does.
    """

    def __init__(self, inner: Observer, notes: Path) -> None:
        self.inner, self.notes = inner, notes
        self.roster = Roster()

    def met(self, roster: Roster) -> None:
        self.roster = roster
        self.inner.met(roster)

    def round_started(self, server_round: int, num_rounds: int, num_clients: int) -> None:
        self.inner.round_started(server_round, num_rounds, num_clients)

    def replied(self, client_id: str, cause: str) -> None:
        self.inner.replied(client_id, cause)

    def round_finished(self, metrics: Mapping[str, object]) -> None:
        note = {"round": metrics["round"], "bytes": psutil.Process().memory_info().rss}
        with self.notes.open("a", encoding="utf-8") as file:
            file.write(json.dumps(note) + "\n")
        self.inner.round_finished(metrics)

    def resident_bytes(self) -> list[int]:
        """After each training round, in order."""
        lines = self.notes.read_text(encoding="utf-8").splitlines()
        notes = {note["round"]: note["bytes"] for note in map(json.loads, lines)}
        return [notes[server_round] for server_round in sorted(notes) if server_round > 0]


def figures_of(run: RunFolder, witness: Witness) -> dict[str, object]:
    """What the verdict needs, from the run folder and from who watched."""
    roster, config = witness.roster, RunFolder.open(run.path)[1]
    share = round(config.fraction_train * len(roster.members))
    rows = run.metrics()
    trained = [row for row in rows if row["round"] > 0]
    with (run.path / "clients.csv").open(encoding="utf-8", newline="") as file:
        told = [row for row in csv.DictReader(file) if row["status"] == LEFT_OUT and row["cause"]]
    causes = Counter(cause.split(":")[0] for cause in roster.left_out.values())
    losses = [row["eval_loss"] for row in rows if row.get("eval_loss") is not None]
    return {
        "rounds": len(trained),
        "rounds asked": config.num_server_rounds,
        "clients": len(roster.members),
        "left out": len(roster.left_out),
        "left out in clients.csv": len(told),
        "without train rows": causes.get("no train rows", 0),
        "clients a round asked": max(config.min_train_clients, share),
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
    told, without = row["left out in clients.csv"], row["without train rows"]
    fewest = min(row["clients a round"], default=0)
    counts = (
        ("rounds completed", row["rounds asked"], row["rounds"]),
        ("clients known", clients, known),
        ("clients left out with their cause in clients.csv", row["left out"], told),
        ("updates counted in the round with fewest", row["clients a round asked"], fewest),
    )
    checks = [
        Check(claim=f"{who}: {what}", expected=asked, seen=seen, any_scale=True)
        for what, asked, seen in counts
    ]
    fallen = _difference(row["loss of the base"], row["loss"])
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


def _difference(first: float | None, last: float | None) -> float:
    return float("nan") if first is None or last is None else first - last


def _growth(resident: list[int]) -> float:
    """The mean of the last half over the mean of the first; round 1 makes what all others use."""
    later = resident[1:]
    half = len(later) // 2
    if not half:
        return float("nan")
    return statistics.fmean(later[half:]) / statistics.fmean(later[:half])
