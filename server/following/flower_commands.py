"""``flwr run``, ``list`` and ``stop`` as the follower calls them: processes, answers in JSON."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexlora.errors import UserError
from flexlora.server.following.place import Place

__all__ = ["FlowerCommands", "NoAnswer"]

CONNECTION = "flexlora"  # in flwr/config.toml of the server folder
TIMEOUT_SECONDS = 120.0
MOST_CHARACTERS = 300


class NoAnswer(RuntimeError):
    """The SuperLink did not answer a command, with what the command said."""


@dataclass(frozen=True, kw_only=True)
class FlowerCommands:
    """Flower's command line for one federation."""

    program: str
    environment: dict[str, str]
    app: Path

    @classmethod
    def of(cls, place: Place) -> FlowerCommands:
        """
        Raises:
            UserError: there is no ``flwr`` where the folder's ``environment`` says.
        """
        environment = {**os.environ, **place.environment, "NO_COLOR": "1"}
        environment["FLWR_HOME"] = str(place.flower_home())
        program = shutil.which("flwr", path=environment.get("PATH"))
        if program is None:
            raise UserError(
                f"there is no flwr in the PATH of '{place.folder / 'environment'}'; is FlexLoRA "
                "still installed there?"
            )
        return cls(program=program, environment=environment, app=place.app)

    def submit(self, run_config: Path) -> str:
        """Start a run with the values of a TOML file over the app's own; returns its id.

        Raises:
            NoAnswer: it was not taken.
        """
        answer = self._call("run", str(self.app), CONNECTION, "--run-config", str(run_config))
        return str(answer["run-id"])

    def status(self, run_id: str) -> tuple[str, str]:
        """Flower's status of a run, such as ``finished:failed``, and its details.

        A run that the SuperLink does not know, as its database is another, is ``unknown``.

        Raises:
            NoAnswer: the SuperLink did not answer.
        """
        runs = self._call("list", CONNECTION)["runs"]
        run = next((run for run in runs if run["run-id"] == run_id), None)
        if run is None:
            return "unknown", "the SuperLink does not know the run"
        return str(run["status"]), str(run.get("status-details") or "")

    def stop(self, run_id: str) -> None:
        """
        Raises:
            NoAnswer: the SuperLink did not answer.
        """
        self._call("stop", run_id, CONNECTION)

    def _call(self, *words: str) -> dict[str, Any]:
        try:
            # A session of its own: Ctrl-C in the terminal is the follower's to answer.
            done = subprocess.run(
                [self.program, *words, "--format", "json"],
                env=self.environment,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_SECONDS,
                check=False,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            raise NoAnswer(f"`flwr {words[0]}` took over {TIMEOUT_SECONDS:g} s") from None
        answer = _json_in(done.stdout)
        if done.returncode or not answer.get("success"):
            said = answer.get("error-message") or done.stderr or done.stdout
            raise NoAnswer(" ".join(str(said).split())[:MOST_CHARACTERS] or "no answer")
        return answer


def _json_in(text: str) -> dict[str, Any]:
    """The object in what a command printed, which may have lines of words before it."""
    try:
        found = json.loads(text[text.index("{") :])
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
