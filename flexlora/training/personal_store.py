"""Where the factors that never leave a client lie between its rounds.

One safetensors file a client and round, written atomically; of every client the last two rounds, so
that a run which repeats a round finds what the client had before it. Nothing is pickled. Whoever
hands jobs to a worker attaches before and keeps after:

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

__all__ = ["Kept", "PersonalStore"]

ROUNDS_KEPT = 2
_FILE = re.compile(r"round-(\d+)\.safetensors")


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A client's own factors after ``server_round``, which it trained in ``rank_class``.

    ``since`` is when it has them on a simulated clock: they are kept when the clock knows that they
    will be there, which is before.
    """

    client_id: str
    server_round: int
    rank_class: str
    adapter: Adapter
    since: float = 0.0


class PersonalStore:
    """Own factors by client, in ``folder``, or in memory where that is None.

    A folder is one run's: its rounds are counted from 1, and a later run would take them for its
    own. It is made when there is something to keep. ``what`` lies there is for what is told.
    """

    def __init__(self, folder: Path | None = None, *, what: str = "personal factors") -> None:
        self.folder, self.what = folder, what
        self._held: dict[str, dict[int, Kept]] = {}

    def beside(self, name: str, what: str) -> PersonalStore:
        """A store for other factors of the same clients, which goes where this one goes."""
        return PersonalStore(self.folder and self.folder / name, what=what)

    def attach(self, jobs: Sequence[TrainJob]) -> list[TrainJob]:
        """The jobs with what each client had before the job's round."""
        return [self._attached(job) for job in jobs]

    def _attached(self, job: TrainJob) -> TrainJob:
        kept = self.before(job.client_id, job.server_round)
        return job if kept is None else replace(job, personal=kept.adapter)

    def attach_eval(self, jobs: Sequence[EvalJob], *, now: float = math.inf) -> list[EvalJob]:
        """The jobs with what each client has by the job's round and ``now``, over its own class.

        A client whose class is not among the adapters has moved to another since it trained: it is
        scored without its factors until it trains there.
        """
        attached = []
        for job in jobs:
            kept = self.before(job.client_id, job.server_round + 1, now=now)
            if kept is not None and kept.rank_class in job.adapters:
                job = replace(job, personal=kept.adapter, personal_over=kept.rank_class)
            attached.append(job)
        return attached

    def keep(
        self, results: Sequence[TrainResult], jobs: Sequence[TrainJob], *, since: float = 0.0
    ) -> None:
        """Keep what was trained; who trained nothing of its own keeps what it had."""
        for result, job in zip(results, jobs, strict=True):
            if result.personal is None:
                continue
            kept = Kept(
                client_id=job.client_id,
                server_round=job.server_round,
                rank_class=job.start.rank_class.name,
                adapter=result.personal,
                since=since,
            )
            self.put(kept)

    def before(self, client_id: str, server_round: int, *, now: float = math.inf) -> Kept | None:
        """The last that this client kept in a round before ``server_round``, and has ``now``.

        Raises:
            UserError: a file that is not what was written.
        """
        earlier = [at for at in self._rounds(client_id) if at < server_round]
        for at in sorted(earlier, reverse=True):
            kept = self._kept(client_id, at)
            if kept.since <= now:
                return kept
        return None

    def _kept(self, client_id: str, server_round: int) -> Kept:
        if self.folder is None:
            return self._held[client_id][server_round]
        return _read(self._path(client_id, server_round), client_id, self.what)

    def _rounds(self, client_id: str) -> list[int]:
        if self.folder is None:
            return list(self._held.get(client_id, ()))
        folder = self._path(client_id, 0).parent
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        return [int(found[1]) for name in names if (found := _FILE.fullmatch(name))]

    def put(self, kept: Kept) -> None:
        """Keep these, and of this client's others the last round before them."""
        if self.folder is None:
            self._held.setdefault(kept.client_id, {})[kept.server_round] = kept
        else:
            # What was learned from private rows is for this user's eyes only.
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomically(self._path(kept.client_id, kept.server_round), _bytes(kept))
        self._trim(kept.client_id)

    def _trim(self, client_id: str) -> None:
        """Drop all but the last rounds; a late round does not drop those that came after it."""
        for at in sorted(self._rounds(client_id))[:-ROUNDS_KEPT]:
            if self.folder is None:
                del self._held[client_id][at]
            else:
                self._path(client_id, at).unlink()

    def _path(self, client_id: str, server_round: int) -> Path:
        """A client's file; an id is text of any kind, so its digest is the name."""
        assert self.folder is not None
        told = re.sub(r"[^a-z0-9]+", "-", client_id.lower()).strip("-")[:24]
        digest = hashlib.sha256(client_id.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        name = f"{told}-{digest}" if told else digest
        return self.folder / name / f"round-{server_round:06d}.safetensors"


def _bytes(kept: Kept) -> bytes:
    """The factors, and what else there is to know as JSON in the file's own header."""
    tensors = {}
    for name, factors in kept.adapter.items():
        tensors[f"{name}.lora_A"] = factors.lora_A.detach().cpu().contiguous()
        tensors[f"{name}.lora_B"] = factors.lora_B.detach().cpu().contiguous()
    index = {
        "client_id": kept.client_id,
        "server_round": kept.server_round,
        "rank_class": kept.rank_class,
        "since": kept.since,
        "modules": {name: [f.alpha, f.rslora] for name, f in kept.adapter.items()},
    }
    return save(tensors, metadata={"personal": json.dumps(index)})


def _read(path: Path, client_id: str, what: str) -> Kept:
    try:
        with safe_open(path, framework="pt") as file:
            index: dict[str, Any] = json.loads((file.metadata() or {})["personal"])
            # Memory of its own: alignment decides which kernel runs, and so the last bit.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        if index["client_id"] != client_id:
            raise ValueError(f"it is client '{index['client_id']}' that it belongs to")
        modules = {
            name: LoRAFactors(
                lora_A=tensors[f"{name}.lora_A"],
                lora_B=tensors[f"{name}.lora_B"],
                alpha=float(alpha),
                rslora=bool(rslora),
            )
            for name, (alpha, rslora) in index["modules"].items()
        }
        return Kept(
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
