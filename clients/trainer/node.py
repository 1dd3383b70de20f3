"""What is the node owner's and what is the run's: one configuration out of two.

The owner says which base, which data, how the base is held and where it computes; none of that can
be changed by a request, so that a request can neither name a file nor make the trainer load another
model. Everything else (ranks, training, evaluation, the method, the seed) is the run's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexlora.config.resolve import KEYS, Config, of_flower
from flexlora.errors import UserError

__all__ = ["ALONE", "Node", "data_state", "job_config", "owned"]

# The one client of a folder, with all of its rows.
ALONE = {"data.name": "", "data.partition": "iid", "clients.count": 1, "clients.quantization": ""}
# Keys of the run that name a place: for a server or a simulation, never for a trainer.
_PLACES = (
    "out",
    "resume",
    "ranks.file",
    "population.trace",
    "population.clock-model",
    "engine.ray-address",
    "server.metrics-host",
)


def owned(key: str) -> bool:
    """Whether a key is the node owner's to say."""
    mine = key.startswith(("model.", "data.", "clients."))
    return (mine and key != "data.template") or key in ("engine.device", "engine.threads")


@dataclass(frozen=True, kw_only=True)
class Node:
    """What a trainer was started with; without a ``client_id`` the node config gives the name."""

    config: Config
    client_id: str = ""

    @classmethod
    def of(
        cls,
        *,
        model: str,
        data: str,
        quantization: str = "none",
        device: str = "auto",
        client_id: str = "",
        sets: Sequence[str] = (),
    ) -> Node:
        """From the command line; ``sets`` are further ``key=value`` of the owner's.

        Raises:
            UserError: a key that is the run's, or whatever ``Config`` refuses.
        """
        given = Config.given(sets=tuple(sets))
        odd = [key for key in given if not owned(key) or key in ALONE]
        if odd:
            raise UserError(
                f"--set got '{odd[0]}', which is not the node's to say; expected one of "
                f"{', '.join(key for key in KEYS if owned(key) and key not in ALONE)}."
            )
        named = {
            "model.name": model,
            "model.quantization": quantization,
            "engine.device": device,
            "data.path": data,
        }
        return cls(config=Config.of({**named, **given, **ALONE}), client_id=client_id)

    def name_for(self, told: str, node_id: int) -> str:
        """The client that this node is: the owner's name, else the node config's, else its number.

        Raises:
            UserError: owner and node config give different names.
        """
        if told and self.client_id and told != self.client_id:
            raise UserError(
                f"the node config says client-id '{told}' and the trainer was started with "
                f"--client-id '{self.client_id}'; give one of them, or both the same."
            )
        return self.client_id or told or f"node_{node_id}"


def job_config(node: Config, run: Mapping[str, Any]) -> Config:
    """The run's configuration with what is the node's put in its place.

    Raises:
        UserError: a key that this FlexLoRA does not know, or a value out of its range.
    """
    given = of_flower(run)
    kept = {key: value for key, value in given.items() if key not in _PLACES and not owned(key)}
    return Config.of({**kept, **{key: value for key, value in node.flat().items() if owned(key)}})


def data_state(folder: str) -> str:
    """A digest of names, sizes and times of a data folder's files: another one, other rows."""
    if not folder:
        return ""
    found = []
    for path in sorted(Path(folder).expanduser().glob("*.jsonl*")):
        seen = path.stat()
        found.append([path.name, seen.st_size, seen.st_mtime_ns])
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()
