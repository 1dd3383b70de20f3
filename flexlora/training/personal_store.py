"""Stores a client's private factors between its rounds.

One safetensors file per client and round, written atomically. The last rounds of each client are
stored (two by default), so that a repeated round starts from the same factors. Callers attach
before a job and store after it:

    jobs = store.attach(jobs);  results = worker.train(jobs);  store.keep(results, jobs)
    results = worker.evaluate(store.attach_eval(jobs))
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from flexlora.errors import UserError
from flexlora.lora.adapters import Adapter, LoRAFactors
from flexlora.wire.files import write_atomically
from flexlora.wire.jobs import EvalJob, TrainJob, TrainResult

__all__ = ["PersonalStore", "StoredFactors"]

ROUNDS_KEPT = 2  # the round before, and the one that may be repeated
FORMAT = 1  # of a file
_FILE = re.compile(r"round-(\d+)\.safetensors")


@dataclass(frozen=True, kw_only=True)
class StoredFactors:
    """A client's factors after ``server_round``, in which its class was ``rank_class``.

    ``since`` is the simulated time from which the client has them; a simulation computes and stores
    them earlier.
    """

    client_id: str
    server_round: int
    rank_class: str
    adapter: Adapter
    since: float = 0.0


class PersonalStore:
    """Factors by client and round, in ``folder``, or in memory where that is None.

    A folder belongs to one run: rounds are counted from 1 in each run. It is created with the first
    file. ``what`` names the factors in error messages. ``rounds_kept`` is how many of a client's
    rounds are stored: one more than may be repeated.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        what: str = "personal factors",
        rounds_kept: int = ROUNDS_KEPT,
    ) -> None:
        self.folder, self.what, self.rounds_kept = folder, what, rounds_kept
        self._in_memory: dict[str, dict[int, StoredFactors]] = {}

    def attach(self, jobs: Sequence[TrainJob]) -> list[TrainJob]:
        """The jobs with the factors that each client had before the job's round."""
        return [self._attached(job) for job in jobs]

    def _attached(self, job: TrainJob) -> TrainJob:
        stored = self.before(job.client_id, job.server_round)
        return job if stored is None else replace(job, personal=stored.adapter)

    def attach_eval(self, jobs: Sequence[EvalJob], *, now: float = math.inf) -> list[EvalJob]:
        """The jobs with each client's factors as of the job's round and ``now``.

        A client that has changed its rank class since, so that its factors' class is not among the
        job's adapters, is scored without them until it trains in the new class.
        """
        attached = []
        for job in jobs:
            stored = self.before(job.client_id, job.server_round + 1, now=now)
            if stored is not None and stored.rank_class in job.adapters:
                job = replace(job, personal=stored.adapter, personal_over=stored.rank_class)
            attached.append(job)
        return attached

    def keep(
        self, results: Sequence[TrainResult], jobs: Sequence[TrainJob], *, since: float = 0.0
    ) -> None:
        """Store the personal factors of ``results``; a result without any changes nothing."""
        for result, job in zip(results, jobs, strict=True):
            if result.personal is None:
                continue
            stored = StoredFactors(
                client_id=job.client_id,
                server_round=job.server_round,
                rank_class=job.start.rank_class.name,
                adapter=result.personal,
                since=since,
            )
            self.put(stored)

    def before(
        self, client_id: str, server_round: int, *, now: float = math.inf
    ) -> StoredFactors | None:
        """The client's latest factors from before ``server_round`` that it has at time ``now``.

        Raises:
            UserError: a damaged file.
        """
        earlier = [at for at in self._rounds(client_id) if at < server_round]
        for at in sorted(earlier, reverse=True):
            stored = self._load(client_id, at)
            if stored.since <= now:
                return stored
        return None

    def _load(self, client_id: str, server_round: int) -> StoredFactors:
        if self.folder is None:
            return self._in_memory[client_id][server_round]
        return _read(self._path(client_id, server_round), client_id, self.what)

    def _rounds(self, client_id: str) -> list[int]:
        if self.folder is None:
            return list(self._in_memory.get(client_id, ()))
        folder = self._path(client_id, 0).parent
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        return [int(found[1]) for name in names if (found := _FILE.fullmatch(name))]

    def put(self, stored: StoredFactors) -> None:
        """Store ``stored`` and delete all but the ``rounds_kept`` rounds up to it.

        Later rounds are there where the server went back to an earlier one; they are overwritten.
        """
        if self.folder is None:
            self._in_memory.setdefault(stored.client_id, {})[stored.server_round] = stored
        else:
            # Learned from private rows: readable by this user alone.
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomically(self._path(stored.client_id, stored.server_round), _bytes(stored))
        earlier = (at for at in self._rounds(stored.client_id) if at <= stored.server_round)
        for at in sorted(earlier)[: -self.rounds_kept]:
            if self.folder is None:
                del self._in_memory[stored.client_id][at]
            else:
                self._path(stored.client_id, at).unlink()

    def _path(self, client_id: str, server_round: int) -> Path:
        """A client's file; ids are arbitrary text, so the folder name has a digest of the id."""
        assert self.folder is not None
        readable = re.sub(r"[^a-z0-9]+", "-", client_id.lower()).strip("-")[:24]
        digest = hashlib.sha256(client_id.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        name = f"{readable}-{digest}" if readable else digest
        return self.folder / name / f"round-{server_round:06d}.safetensors"


def _bytes(stored: StoredFactors) -> bytes:
    """A safetensors file; everything but the tensors is JSON in its header."""
    index = {
        "format": FORMAT,
        "client_id": stored.client_id,
        "server_round": stored.server_round,
        "rank_class": stored.rank_class,
        "since": stored.since,
        "modules": {name: [f.alpha, f.rslora] for name, f in stored.adapter.items()},
    }
    return save(stored.adapter.tensors(), metadata={"personal": json.dumps(index)})


def _read(path: Path, client_id: str, what: str) -> StoredFactors:
    try:
        with safe_open(path, framework="pt") as file:
            index: dict[str, Any] = json.loads((file.metadata() or {})["personal"])
            # Clone: alignment in memory decides which kernel runs, and so the last bit.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        if index.get("format", FORMAT) != FORMAT:  # the first version named none
            raise ValueError(f"it has format {index['format']}, this FlexLoRA reads {FORMAT}")
        if index["client_id"] != client_id:
            raise ValueError(f"it belongs to client '{index['client_id']}'")
        modules = {
            name: LoRAFactors(
                lora_A=tensors[f"{name}.lora_A"],
                lora_B=tensors[f"{name}.lora_B"],
                alpha=float(alpha),
                rslora=bool(rslora),
            )
            for name, (alpha, rslora) in index["modules"].items()
        }
        return StoredFactors(
            client_id=client_id,
            server_round=int(index["server_round"]),
            rank_class=str(index["rank_class"]),
            adapter=Adapter(modules),
            since=float(index.get("since", 0.0)),
        )
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"client {client_id}: the {what} in '{path}' cannot be read ({error}); "
            "remove the file, and the client goes on from an older one or begins anew."
        ) from None
