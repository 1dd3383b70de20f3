"""Where a federation lies: its app in the server folder, its run folders, the follower's notes.

DIR/app/pyproject.toml                  the federation ``app``
DIR/federations/NAME/pyproject.toml     further ones on the same SuperLink
STATE/runs/NAME-0001                    run folders, STATE as ``bin/start-serverapps`` has it
STATE/follower/NAME.json              which run is followed, and what came before it
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from flexlora.config.resolve import Config, of_flower, read_toml
from flexlora.errors import UserError, nearest
from flexlora.wire.files import write_atomically

__all__ = ["APP", "Place", "Standing"]

APP = "app"
_CONFIG = "tool.flwr.app.config."
_SCHEDULE = "tool.flexlora.schedule."


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What a follower must know after it was killed: the run that it follows, and its past.

    ``planned`` is when the last repetition was to start, in seconds since the epoch; ``open`` is
    whether ``folder`` holds a run that has not finished.
    """

    repetition: int = 0
    folder: str = ""
    run_id: str = ""
    submitted: float = 0.0
    serverapp_port: int = 0  # of its own metrics
    open: bool = False
    planned: float = 0.0
    finished_at: float = 0.0
    finished: int = 0
    failed: int = 0
    last_folder: str = ""  # of the last run that finished


@dataclass(frozen=True, kw_only=True)
class Place:
    """One federation of a server folder."""

    folder: Path
    name: str
    app: Path
    state: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: str, name: str = APP) -> Place:
        """The federation ``name`` of a folder that ``flexlora server init`` made.

        Raises:
            UserError: it is no such folder, or has no federation of that name.
        """
        path = Path(folder).resolve()
        missing = [n for n in ("environment", "flwr/config.toml") if not (path / n).is_file()]
        if missing:
            raise UserError(
                f"'{folder}' has no {' and no '.join(missing)}, expected a folder that `flexlora "
                "server init` made."
            )
        known = [APP, *sorted(p.parent.name for p in path.glob("federations/*/pyproject.toml"))]
        if name not in known:
            raise UserError(
                f"'{folder}' has no federation '{name}', expected one of {', '.join(known)}."
                f"{nearest(name, known)} A new one is a copy of app/ in federations/NAME/."
            )
        app = path / APP if name == APP else path / "federations" / name
        state = Path(os.environ.get("STATE_DIRECTORY") or path / "state" / "serverapp")
        lines = (path / "environment").read_text(encoding="utf-8").splitlines()
        pairs = [line.split("=", 1) for line in lines if "=" in line and not line.startswith("#")]
        return cls(folder=path, name=name, app=app, state=state, environment=dict(pairs))

    def config(self) -> Config:
        """The run's configuration, as the app's file says it.

        Raises:
            UserError: the file cannot be read, a key that does not exist, ``resume`` or ``out``.
        """
        given = self._table(_CONFIG)
        config = Config.of(of_flower(given))
        for key in ("out", "resume"):
            if given.get(key):
                raise UserError(
                    f"{key} is '{given[key]}' in '{self.app / 'pyproject.toml'}', but `flexlora "
                    "server run` chooses the run folder itself; leave it empty."
                )
        return config

    def schedule(self) -> dict[str, Any]:
        """``[tool.flexlora.schedule]`` of the app's file."""
        return self._table(_SCHEDULE)

    def _table(self, prefix: str) -> dict[str, Any]:
        values = read_toml(self.app / "pyproject.toml")
        return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}

    def run_folder(self, repetition: int) -> Path:
        return self.state / "runs" / f"{self.name}-{repetition:04d}"

    @property
    def notes(self) -> Path:
        return self.state / "follower"

    def flower_home(self) -> Path:
        """A Flower home that this user can write to, with the connection of the folder's own."""
        home = self.notes / "flwr"
        home.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.folder / "flwr" / "config.toml", home / "config.toml")
        return home

    def read_standing(self, name: str = "") -> Standing:
        """The last one written, of this federation or of another; a new one where there is none.

        Raises:
            UserError: the file is damaged.
        """
        file = self.notes / f"{name or self.name}.json"
        try:
            return TypeAdapter(Standing).validate_json(file.read_bytes())
        except FileNotFoundError:
            return Standing()
        except (OSError, ValueError):
            raise UserError(
                f"'{file}' is damaged; remove it, and the next run is a new one (a run folder goes "
                "on with `flwr run` and its resume.toml)."
            ) from None

    def write_standing(self, standing: Standing) -> None:
        text = json.dumps(asdict(standing), indent=1) + "\n"
        write_atomically(self.notes / f"{self.name}.json", text.encode())
