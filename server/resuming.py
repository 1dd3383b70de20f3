"""Choose the folder that a ServerApp writes to, and whether it resumes the run in it.

Flower resumes a run in two ways. A ServerApp that is started again for the same run finds the
folder by the run's id. A new ``flwr run`` names the folder with ``resume``: since clients read the
configuration of the new run, it must equal the folder's in every key that clients read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import tomli_w

from flexlora.aggregation.engine.state import State
from flexlora.config.resolve import Config
from flexlora.errors import UserError
from flexlora.runs.folder import RunFolder
from flexlora.wire.files import write_atomically

__all__ = [
    "FINAL",
    "RESUME_FILE",
    "Destination",
    "check_start",
    "destination_of",
    "how_to_resume",
    "settle",
    "start_state",
]

# Before the cause of a failure that the same run would meet again; ``flexlora server run`` reads it
# in what Flower says of a run.
FINAL = "not to be tried again: "
RUN_ID, ORIGIN = "flower_run_id", "first_flower_run_id"  # in environment.json
RESUME_FILE = "resume.toml"  # in the run folder: what `flwr run --run-config` is given


@dataclass(frozen=True, kw_only=True)
class Destination:
    """Where a run is written; ``overwrite`` is for one that stopped before its first round."""

    folder: Path
    config: Config
    resume: bool = False
    overwrite: bool = False
    allow_changed: bool = False


def destination_of(config: Config, run_id: int) -> Destination:
    """The folder of the run with this configuration and Flower's id.

    Raises:
        UserError: ``resume`` names no run, none that has finished a round, or one that was
            configured differently.
    """
    if config.resume:
        return _resumed(config)
    folder = Path(config.out or f"runs/{run_id}")
    if not (RunFolder.is_run(folder) and _run_id(folder) == str(run_id)):
        return Destination(folder=folder, config=config)
    finished = (RunFolder(folder).checkpoint / "current.json").is_file()
    return Destination(folder=folder, config=config, resume=finished, overwrite=not finished)


def _resumed(config: Config) -> Destination:
    run, saved = RunFolder.open(config.resume)
    if config.out and Path(config.out).resolve() != run.path.resolve():
        raise UserError(
            f"resume is '{run.path}' and out is '{config.out}', expected one of the two: "
            "a resumed run goes on in its own folder."
        )
    before = saved.flat()
    for key, value in config.flat().items():
        if value != before.get(key) and not _may_differ(key, value, before.get(key)):
            raise UserError(
                f"{key} is {value!r}, expected {before.get(key)!r} as in '{run.path}', which is "
                f"resumed; give {_whole(run.path)} as the only --run-config."
            )
    run.load_checkpoint()  # raises before any node is queried
    allowed = config.allow_changed
    config = config.with_values({"resume": "", "out": "", "allow-changed": False})
    return Destination(folder=run.path, config=config, resume=True, allow_changed=allowed)


def _may_differ(key: str, value: object, saved: object) -> bool:
    """Keys that no client reads, and a larger number of rounds."""
    if key == "num-server-rounds":
        return int(str(value)) >= int(str(saved))
    return key in ("out", "resume", "allow-changed", "report-to") or key.startswith("server.")


def _whole(folder: Path) -> str:
    """How to repeat a run's configuration: Flower takes one file or pairs, never both."""
    if (folder / RESUME_FILE).is_file():
        return f"'{folder / RESUME_FILE}'"
    return f"a copy of '{folder / 'config.toml'}' with resume = \"{folder}\" in it"


def start_state(config: Config) -> State:
    """What the run in ``start-from`` has learned, as round 0 of another.

    Raises:
        UserError: it is no run folder, has finished no round, or was run with another method.
    """
    run, before = RunFolder.open(config.start_from)
    if before.method.name != config.method.name:
        raise UserError(
            f"start-from is '{config.start_from}', a run of method.name={before.method.name}, "
            f"expected one of {config.method.name} as this run's."
        )
    state, _ = run.load_checkpoint()
    return replace(state, round=0)


def check_start(state: State, shapes: Mapping[str, tuple[int, int]], config: Config) -> None:
    """
    Raises:
        UserError: the state is of other modules, or of other shapes, than this run trains.
    """
    there = state.change.shapes
    other = sorted(k for k in there.keys() | shapes.keys() if there.get(k) != shapes.get(k))
    if other:
        raise UserError(
            f"start-from is '{config.start_from}', whose module '{other[0]}' is "
            f"{there.get(other[0], 'not there')}, expected {shapes.get(other[0], 'none')}: give "
            "lora.target-modules and the base of that run."
        )


def how_to_resume(folder: Path) -> str:
    """The command that goes on with the run in ``folder``."""
    if (folder / RESUME_FILE).is_file():
        return f"flwr run . --run-config {folder / RESUME_FILE}"
    return f"flexlora simulate --resume {folder}"


def settle(run: RunFolder, config: Config, run_id: int) -> str:
    """Mark the folder as this run's, and write the configuration that resumes it.

    Returns Flower's id of the first run in the folder: nodes store their files under that id.
    """
    nested = {k: v for k, v in config.with_values({"resume": ""}).nested().items() if k != "out"}
    write_atomically(run.path / "config.toml", tomli_w.dumps(nested).encode())
    resumed = config.with_values({"resume": str(run.path.resolve()), "out": ""}).nested()
    write_atomically(run.path / RESUME_FILE, tomli_w.dumps(resumed).encode())
    environment = {ORIGIN: str(run_id)} | _environment(run.path) | {RUN_ID: str(run_id)}
    text = json.dumps(environment, indent=1, sort_keys=True) + "\n"
    write_atomically(run.path / "environment.json", text.encode())
    return str(environment[ORIGIN])


def _environment(folder: Path) -> dict:
    try:
        read = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}


def _run_id(folder: Path) -> str:
    return str(_environment(folder).get(RUN_ID, ""))
