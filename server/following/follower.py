"""Follow one federation's runs: submit, watch, start again after a kill, until all rounds are done.

A run that ended for a cause that may pass (its ServerApp was killed, the SuperLink away, few nodes)
goes on from its last checkpoint, after a pause that doubles each time; a round that was
closed since makes the count start over. What a ServerApp says is final (a wrong key, no room on the
disk, nobody was trained) ends the run. The standing on disk names the run that is followed, so that
a follower that was killed follows it again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import psutil
import tomli_w

from flexlora.config.resolve import read_toml
from flexlora.errors import UserError
from flexlora.runs.folder import RunFolder
from flexlora.runs.live_state import LiveState, process_space, read_live
from flexlora.server.following.flower_commands import NoAnswer
from flexlora.server.following.place import Place, Standing
from flexlora.server.following.schedule import ADAPTER, Schedule
from flexlora.server.resuming import FINAL, RESUME_FILE
from flexlora.wire.files import write_atomically

__all__ = ["Commands", "Follower", "Pace"]

IDLE, WAITING, RUNNING, FAILED = "idle", "waiting", "running", "failed"
COMPLETED, STOPPED, FINISHED = "finished:completed", "finished:stopped", "finished:"


class Commands(Protocol):
    """What is asked of Flower; ``FlowerCommands`` asks its command line."""

    def submit(self, run_config: Path) -> str: ...

    def status(self, run_id: str) -> tuple[str, str]: ...

    def stop(self, run_id: str) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Seconds between looks and attempts; ``attempts`` without a new round end a run."""

    look: float = 2.0  # at the run folder
    ask: float = 30.0  # Flower, for the run's status: a process of a second or two
    dead: float = 15.0  # after which a run whose process is gone is stopped at Flower's side
    first_pause: float = 10.0
    longest_pause: float = 300.0
    attempts: int = 6

    def pause(self, attempt: int) -> float:
        """Before the ``attempt``-th start without a new round, from 1."""
        return min(self.first_pause * 2.0 ** (attempt - 1), self.longest_pause)


class Follower:
    """One federation; ``state`` and ``starts`` are for its metrics, ``say`` prints a line."""

    def __init__(
        self,
        place: Place,
        commands: Commands,
        say: Callable[[str], None],
        *,
        pace: Pace = Pace(),
        metrics_port: Callable[[], int] = lambda: 0,
        sleep: Callable[[float], None] = time.sleep,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.place, self.commands, self.say, self.pace = place, commands, say, pace
        self.metrics_port, self.sleep, self.now = metrics_port, sleep, now
        self.schedule = Schedule.of(place.schedule())
        self.standing: Standing = place.read_standing()
        self.state, self.starts = IDLE, 0
        self._said = ""

    def run(self) -> int:
        """All runs of the schedule; 0, or 1 where the last one failed.

        Raises:
            UserError: the app's file is not as it should be, or a run folder.
        """
        self.place.config()
        while True:
            if not self.standing.open:
                self._wait_for_start()
            status = self._one_run()
            self.state = FAILED if status else IDLE
            if not self.schedule.every:
                return status

    def stop(self) -> None:
        """End the run that is followed, in Flower and so its ServerApp; its last round stands."""
        standing = self.standing
        if not standing.run_id:
            return
        try:
            self.commands.stop(standing.run_id)
            self.say(f"run {standing.run_id} is stopped; `flexlora server run` goes on with it.")
        except NoAnswer as error:
            self.say(f"run {standing.run_id} could not be stopped: {error}")
        self._note(run_id="")

    # The schedule

    def _wait_for_start(self) -> None:
        schedule, standing = self.schedule, self.standing
        now = self.now()
        start = schedule.next_start(now, standing.planned if schedule.every else 0.0)
        if start > now:
            moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(start))
            self._wait(lambda: self.now() >= start, f"the next run starts at {moment}")
        if schedule.after:
            since = standing.planned
            self._wait(
                lambda: self.place.read_standing(schedule.after).finished_at > since,
                f"the next run starts once {schedule.after} has finished one",
            )
        repetition = standing.repetition + 1
        while self.place.run_folder(repetition).exists():
            repetition += 1
        folder = str(self.place.run_folder(repetition))
        self._note(repetition=repetition, folder=folder, run_id="", open=True, planned=start)

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        self.state = WAITING
        if not condition():
            self.say(f"{what}.")
        while not condition():
            self.sleep(self.pace.look)

    # One run

    def _one_run(self) -> int:
        """Until it has finished (0) or is given up (1)."""
        attempt, rounds = 0, self._rounds()
        while True:
            try:
                if not self.standing.run_id:
                    self._submit()
                status, details = self._follow()
            except NoAnswer as error:
                status, details = "not submitted", str(error)
            if status == COMPLETED:
                return self._ended(0, f"finished: {self.standing.folder}")
            if status == STOPPED:
                return self._ended(1, "was stopped, and is not started again")
            if FINAL in details:
                return self._ended(1, f"failed: {details.partition(FINAL)[2]}")
            now = self._rounds()
            attempt, rounds = (1 if now > rounds else attempt + 1), now
            self._note(run_id="")
            if attempt > self.pace.attempts:
                times = f"{attempt} times without closing a round"
                return self._ended(1, f"failed {times}: {details}")
            pause = self.pace.pause(attempt)
            self.state = WAITING
            after = f"after round {rounds - 1}" if rounds else "before its first round was closed"
            self.say(f"the run ended {after} ({details or status}); again in {pause:g} s.")
            self.sleep(pause)

    def _ended(self, status: int, what: str) -> int:
        run_id, standing = self.standing.run_id, self.standing
        self._note(
            run_id="",
            open=False,
            finished_at=self.now() if status == 0 else standing.finished_at,
            finished=standing.finished + (status == 0),
            failed=standing.failed + (status != 0),
            last_folder=standing.folder if status == 0 else standing.last_folder,
        )
        self.say(f"run {run_id or Path(standing.folder).name} {what}.")
        return status

    def _submit(self) -> None:
        """A new run, or one that goes on with the folder where that has a checkpoint."""
        run = RunFolder(self.standing.folder)
        resumed = (run.checkpoint / "current.json").is_file()
        if not resumed and run.path.exists() and run.metrics():
            # Killed between the first rows and their checkpoint: nothing to go on from.
            self._note(repetition=self.standing.repetition + 1)
            run = RunFolder(self.place.run_folder(self.standing.repetition))
            self._note(folder=str(run.path))
        values = self._values(run.path, resumed)
        file = self.place.notes / f"{self.place.name}-run.toml"
        write_atomically(file, tomli_w.dumps(_nested(values)).encode())
        submitted = self.now()
        run_id = self.commands.submit(file)
        self.starts += 1
        self._note(run_id=run_id, submitted=submitted)
        how = "goes on in" if resumed else "writes to"
        self.say(f"run {run_id} {how} {run.path}")

    def _values(self, folder: Path, resumed: bool) -> dict[str, object]:
        """What is submitted over the app's own values, by dotted key."""
        self._note(serverapp_port=self.metrics_port())
        values: dict[str, object] = {"out": str(folder)}
        if resumed:
            values = dict(read_toml(folder / RESUME_FILE))
        elif self.schedule.start_from == ADAPTER and self.standing.last_folder:
            values["start-from"] = self.standing.last_folder
        values |= {
            "server.metrics-port": self.standing.serverapp_port,
            "server.metrics-host": "127.0.0.1",
        }
        return values

    def _follow(self) -> tuple[str, str]:
        """Flower's status and its details once the run has ended."""
        self.state, run_id, folder = RUNNING, self.standing.run_id, Path(self.standing.folder)
        asked, gone_since, last = 0.0, 0.0, -1
        while True:
            live = read_live(folder)
            if live is not None and live.started < self.standing.submitted:
                live = None  # of the process before
            gone = live is not None and (live.ended or _is_gone(live))
            gone_since = (gone_since or time.monotonic()) if gone else 0.0
            if live is not None and live.num_rounds and live.round != last and not gone:
                last = live.round
                self.say(f"round {live.round} of {live.num_rounds}, {live.asked} clients")
            if not asked or time.monotonic() - asked > (self.pace.look if gone else self.pace.ask):
                status, details = self._status(run_id)
                asked = time.monotonic()
                if status.startswith(FINISHED) or status == "unknown":
                    return status, details
                if status and gone_since and time.monotonic() - gone_since > self.pace.dead:
                    self.commands.stop(run_id)
                    return "finished:failed", "the ServerApp's process is gone"
            self.sleep(self.pace.look)

    def _status(self, run_id: str) -> tuple[str, str]:
        try:
            found = self.commands.status(run_id)
            self._said = ""
            return found
        except NoAnswer as error:
            if not self._said:
                self.say(f"the SuperLink does not answer ({error}); asking on.")
            self._said = str(error)
            return "", ""

    def _rounds(self) -> int:
        """How many rounds the run's folder has, round 0 included."""
        try:
            return len(RunFolder(self.standing.folder).metrics()) if self.standing.folder else 0
        except UserError:
            return 0

    def _note(self, **values: object) -> None:
        self.standing = replace(self.standing, **values)  # type: ignore[arg-type]  # by field name
        self.place.write_standing(self.standing)


def _nested(flat: dict[str, object]) -> dict[str, object]:
    """Dotted keys as nested tables."""
    nested: dict[str, object] = {}
    for key, value in flat.items():
        section, _, leaf = key.rpartition(".")
        table = nested.setdefault(section, {}) if section else nested
        assert isinstance(table, dict)
        table[leaf] = value
    return nested


def _is_gone(live: LiveState) -> bool:
    """Whether the process that wrote the state has ended; False where that cannot be seen."""
    if live.host != process_space() or live.pid <= 0:
        return False
    try:
        return psutil.Process(live.pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
