"""A run's adapters for `flexlora serve`: rank classes, the global one, those of single clients.

They are read from the checkpoint, not from `adapters/`, which a run writes at its end: so a run in
progress can be served too, and its adapters replaced as rounds close. An answer under way keeps the
adapter that it began with (`flexlora/serving/adapter_store.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flexlora.config.resolve import Config
from flexlora.errors import UserError
from flexlora.lora.adapters import Adapter, LoRAFactors
from flexlora.runs.checkpoints import checkpoint_digest
from flexlora.runs.folder import RunFolder
from flexlora.runs.sources import Sources
from flexlora.server.strategy import FlexLoRAStrategy
from flexlora.serving.adapter_store import AdapterStore
from flexlora.training.personal_store import PersonalStore

__all__ = ["FollowedRun", "RunAdapters", "add_run", "read_run"]

LOG = logging.getLogger(__name__)
GLOBAL, PERSONAL = "global", "client/"


@dataclass(frozen=True, kw_only=True)
class RunAdapters:
    """The adapters of a run after ``server_round``, by name; ``sources`` names their base.

    Names are those of rank classes, ``global``, and ``client/ID`` for a client's personal factors
    together with its class's adapter.
    """

    config: Config
    server_round: int
    adapters: dict[str, Adapter]
    sources: Sources | None


def read_run(path: str | Path) -> RunAdapters:
    """The adapters of a run's last checkpoint.

    Raises:
        UserError: no run folder, no finished round, a damaged checkpoint or personal file.
    """
    run, config = RunFolder.open(path)
    state, by_client = run.load_checkpoint()
    used = {r.name: r for r in sorted(by_client.values(), key=lambda r: (r.rank, r.name))}
    strategy = FlexLoRAStrategy(config)
    adapters = {**strategy.served(state, used), GLOBAL: strategy.global_adapter(state)}
    adapters |= dict(_personal(run, config, adapters, sorted(by_client), state.round))
    return RunAdapters(
        config=config, server_round=state.round, adapters=adapters, sources=run.sources()
    )


def _personal(
    run: RunFolder,
    config: Config,
    adapters: dict[str, Adapter],
    clients: list[str],
    server_round: int,
) -> Iterator[tuple[str, Adapter]]:
    """``T_c(G) + s B_k A_k`` of every client that has factors, as one adapter of both ranks."""
    if not config.personal.rank:
        return
    store = PersonalStore(run.path / "personal")
    for client in clients:
        stored = store.before(client, server_round + 1)
        shared = adapters.get(stored.rank_class) if stored is not None else None
        if stored is None or shared is None:
            continue  # not trained yet, or in a class that it has left since
        modules = {
            name: LoRAFactors.side_by_side([factors, stored.adapter[name]])
            for name, factors in shared.items()
        }
        yield f"{PERSONAL}{client}", Adapter(modules)


def add_run(store: AdapterStore, path: str | Path, *, prefix: str = "") -> RunAdapters:
    """Put all adapters of a run into ``store``, their names after ``prefix``.

    Raises:
        UserError: as ``read_run``; a run on another base; a name that is in use.
    """
    found = read_run(path)
    _check_base(store, found, path)
    for name, adapter in found.adapters.items():
        store.add(f"{prefix}{name}", adapter)
    return found


def _check_base(store: AdapterStore, found: RunAdapters, path: str | Path) -> None:
    now = Sources(base=store.base.fingerprint)
    if found.sources is not None and (changed := found.sources.differences(now, store.base.name)):
        raise UserError(f"the adapters of '{path}' cannot be served: {changed[0]}.")


class FollowedRun:
    """A run in progress: ``poll`` replaces its adapters when another round is finished.

    Their names in ``store`` are those of ``RunAdapters`` after ``prefix``.
    """

    def __init__(self, store: AdapterStore, path: str | Path, *, prefix: str = "") -> None:
        self.store, self.path, self.prefix = store, Path(path), prefix
        self.server_round: int | None = None
        self._names: set[str] = set()
        self._digest = ""

    def poll(self) -> int | None:
        """The round that is served from now on; None where nothing has changed.

        A name that the run does not have any more is removed. Where the run writes at this moment,
        the next poll reads it.

        Raises:
            UserError: no run folder, or a run on another base.
        """
        run, _ = RunFolder.open(self.path)
        try:
            _, digest = checkpoint_digest(run.checkpoint)
            if digest == self._digest:
                return None
            found = read_run(self.path)
        except UserError as error:
            LOG.debug("'%s' is read again later: %s", self.path, error)
            return None
        _check_base(self.store, found, self.path)
        adapters = {f"{self.prefix}{name}": adapter for name, adapter in found.adapters.items()}
        for name, adapter in adapters.items():
            self.store.add(name, adapter, replace=name in self._names)
            self._names.add(name)
        for name in self._names - adapters.keys():
            self.store.remove(name)
            self._names.discard(name)
        self._digest, self.server_round = digest, found.server_round
        return found.server_round
