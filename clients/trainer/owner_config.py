"""Merge the node owner's configuration with the run's.

The owner says which base, which data, how the base is quantized and on which device it runs. A
request cannot change those keys, so it can neither name a file nor make the trainer load another
model. All other keys (ranks, training, evaluation, the method, the seed) are the run's.
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

__all__ = ["ONE_CLIENT", "OwnerConfig", "data_digest", "is_owner_key", "job_config", "of_run"]

# One client that has all rows of its folder.
ONE_CLIENT = {
    "data.name": "",
    "data.partition": "iid",
    "clients.count": 1,
    "clients.quantization": "",
}
# Keys of the run that a node ignores: they name a file or an address on the server, or make a
# simulated client hostile.
_IGNORED = (
    "out",
    "resume",
    "start-from",
    "ranks.file",
    "population.trace",
    "population.hostile",
    "population.clock-model",
    "engine.ray-address",
    "server.metrics-host",
    "server.publish",
)


# All clients train on the same prompts, and not on what the run holds out.
SHARED = ("data.template", "data.template-date", "data.held-out-tasks", "clients.held-out")


def is_owner_key(key: str) -> bool:
    """Whether the node's owner sets this key, and not the run."""
    owners = key.startswith(("model.", "data.", "clients."))
    return (owners and key not in SHARED) or key in ("engine.device", "engine.threads")


@dataclass(frozen=True, kw_only=True)
class OwnerConfig:
    """What a trainer was started with; without ``client_id`` the node config names the client."""

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
    ) -> OwnerConfig:
        """From the command line; ``sets`` are further ``key=value`` pairs.

        Raises:
            UserError: a key that is the run's, or whatever ``Config`` refuses.
        """
        given = Config.given(sets=tuple(sets))
        settable = [key for key in KEYS if is_owner_key(key) and key not in ONE_CLIENT]
        odd = [key for key in given if key not in settable]
        if odd:
            raise UserError(
                f"--set got '{odd[0]}', which is not the node's to say; expected one of "
                f"{', '.join(settable)}."
            )
        named = {
            "model.name": model,
            "model.quantization": quantization,
            "engine.device": device,
            "data.path": data,
        }
        return cls(config=Config.of({**named, **given, **ONE_CLIENT}), client_id=client_id)

    def name_for(self, node_name: str, node_id: int) -> str:
        """The client id: the owner's, else the node config's, else one made of the node id.

        Raises:
            UserError: owner and node config give different names.
        """
        if node_name and self.client_id and node_name != self.client_id:
            raise UserError(
                f"the node config says client-id '{node_name}' and the trainer was started with "
                f"--client-id '{self.client_id}'; give one of them, or both the same."
            )
        return self.client_id or node_name or f"node_{node_id}"


def of_run(run: Mapping[str, Any]) -> dict[str, Any]:
    """The values of Flower's run config that a node reads."""
    return {key: value for key, value in of_flower(run).items() if key not in _IGNORED}


def job_config(owner: Config, run: Mapping[str, Any]) -> Config:
    """The run's configuration with the owner's keys put over it.

    Raises:
        UserError: a key that this FlexLoRA does not know, or a value out of its range.
    """
    taken = {key: value for key, value in of_run(run).items() if not is_owner_key(key)}
    owned = {key: value for key, value in owner.flat().items() if is_owner_key(key)}
    return Config.of({**taken, **owned})


def data_digest(folder: str) -> str:
    """A digest of names, sizes and times of a data folder's files: it changes with the rows."""
    if not folder:
        return ""
    found = []
    for path in sorted(Path(folder).glob("*.jsonl*")):
        seen = path.stat()
        found.append([path.name, seen.st_size, seen.st_mtime_ns])
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()
