"""Runs the programs of the cohort benchmark, each in a process of its own, and checks their work.

Nobody's word is taken: every client of every round must have been trained, for all of its steps and
answer tokens; what came back must be numbers and must have moved; and the losses must be those that
our own training reached from the same start on the same batches.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexlora.simulations.benchmarks.cohort_peers.work import Work

__all__ = ["Program", "Run", "check", "disagreement", "launch", "programs"]

PEERS = "flexlora.simulations.benchmarks.cohort_peers"
FLOWER, FLOWER_CACHED, LOOP = "flower", "flower-cached", "loop"


@dataclass(frozen=True, kw_only=True)
class Program:
    """A way to train the clients of a round; ``threads`` is what each of its processes uses."""

    name: str
    description: str
    module: str
    arguments: tuple[str, ...]
    threads: int
    ours: bool = False


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a program.

    ``stamps[r]`` is the end of round r by the clock, ``cpu_stamps[r]`` what its processes had used
    of the CPU by then.
    """

    began: float
    whole_seconds: float
    stamps: tuple[float, ...]
    cpu_stamps: tuple[float, ...]
    report: dict[str, Any]

    @property
    def startup_seconds(self) -> float:
        """From the start of the process to the first round."""
        return self.stamps[0] - self.began

    def steady_rate(self, clients: int, warmup: int, clock: str = "wall") -> float:
        """Client-trainings a second after the first ``warmup`` rounds."""
        stamps = {"wall": self.stamps, "cpu": self.cpu_stamps}[clock]
        return clients * (len(stamps) - 1 - warmup) / (stamps[-1] - stamps[warmup])


def programs(cores: int, *, workers: tuple[int, ...]) -> list[Program]:
    """The four peers on all of ``cores``, then ours with each number of ``workers``."""
    many = ("--processes", str(cores))
    peers = [
        Program(
            name=FLOWER,
            description="Flower on Ray, PEFT client, model per message",
            module="flower",
            arguments=many,
            threads=1,
        ),
        Program(
            name=FLOWER_CACHED,
            description="Flower on Ray, PEFT client, model kept per process",
            module="flower",
            arguments=("--cache", *many),
            threads=1,
        ),
        Program(
            name=LOOP,
            description=f"PEFT loop, one process of {cores} threads",
            module="loop",
            arguments=("--threads", str(cores)),
            threads=cores,
        ),
        Program(
            name=f"{LOOP}-{cores}",
            description=f"PEFT loop, {cores} processes of one thread",
            module="loop",
            arguments=many,
            threads=1,
        ),
    ]
    distinct = peers if cores > 1 else peers[:-1]
    return distinct + [_ours(cores, count) for count in workers]


def _ours(cores: int, workers: int) -> Program:
    threads = max(1, cores // workers)
    return Program(
        name=f"ours-{workers}",
        description=f"flexlora simulate, engine.workers={workers}, {threads} thread(s)",
        module="ours",
        arguments=("--workers", str(workers), "--threads", str(threads)),
        threads=threads,
        ours=True,
    )


def launch(program: Program, work: Work, report: Path) -> Run:
    """Run ``program`` to its end; the whole run is the life of its process.

    Raises:
        RuntimeError: it failed, with the end of what it said.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(program.threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, "-m", f"{PEERS}.{program.module}", work.folder, str(report)]
    began = time.time()
    done = subprocess.run(
        [*command, *program.arguments], env=environment, capture_output=True, text=True
    )
    whole = time.time() - began
    if done.returncode != 0 or not report.is_file():
        raise RuntimeError(f"{program.name} failed:\n{(done.stdout + done.stderr)[-4000:]}")
    made = json.loads(report.read_text(encoding="utf-8"))
    return Run(
        began=made.get("began", began),
        whole_seconds=made.get("whole_seconds", whole) - made.get("untimed_seconds", 0.0),
        stamps=tuple(made["stamps"]),
        cpu_stamps=tuple(made["cpu_stamps"]),
        report=made,
    )


def check(program: Program, run: Run, work: Work) -> None:
    """Whether all the work was done.

    Raises:
        RuntimeError: what was not.
    """
    if len(run.stamps) != work.num_rounds + 1:
        raise RuntimeError(f"{program.name} ended {len(run.stamps) - 1} rounds.")
    if program.ours:
        _check_ours(program, run, work)
        return
    done = {(t["server_round"], t["client_id"]): t for t in run.report["trainings"]}
    asked = {(r, name) for r in range(1, work.num_rounds + 1) for name in work.clients}
    if done.keys() != asked or len(run.report["trainings"]) != len(asked):
        raise RuntimeError(f"{program.name} trained {len(done)} times, expected {len(asked)}.")
    for (server_round, name), training in done.items():
        wanted = (len(work.plan[server_round - 1][name]), work.answer_tokens(server_round, name))
        if (training["steps"], training["tokens"]) != wanted:
            raise RuntimeError(
                f"{program.name}, round {server_round}, client {name}: {training['steps']} steps "
                f"and {training['tokens']} answer tokens, expected {wanted[0]} and {wanted[1]}."
            )
    if not run.report["finite"] or not run.report["moved"] > 0:
        raise RuntimeError(f"{program.name} sent factors that are not finite or never moved.")


def _check_ours(program: Program, run: Run, work: Work) -> None:
    """Our rows have no steps and tokens: that the losses agree says that they were the same."""
    asked, seen = run.report["workers"], run.report["processes"]
    if seen < asked:
        raise RuntimeError(f"{program.name} had {seen} worker processes, expected {asked}.")
    trained = run.report["trained"]
    if trained != [len(work.clients)] * work.num_rounds:
        raise RuntimeError(f"{program.name} counted {trained} clients in its rounds.")
    before, after = run.report["loss_before"], run.report["loss_after"]
    if sorted(after) != work.clients or any(after[name] == before[name] for name in after):
        raise RuntimeError(f"{program.name} has clients whose loss did not move in round 1.")


def disagreement(run: Run, ours: Run, work: Work) -> float:
    """How far a peer's losses of round 1 are from ours, relatively.

    The mean loss over all steps of all clients, weighted by rows as our server does; where the peer
    reported them, also every client's loss after its last step.
    """
    losses = {t["client_id"]: t["loss"] for t in run.report["trainings"] if t["server_round"] == 1}
    rows = {name: len(work.rows[name]) for name in work.clients}
    mean = sum(losses[name] * rows[name] for name in rows) / sum(rows.values())
    gaps = [abs(mean / ours.report["train_loss"] - 1.0)]
    for name, loss in run.report.get("loss_after", {}).items():
        gaps.append(abs(loss / ours.report["loss_after"][name] - 1.0))
    return max(gaps)
