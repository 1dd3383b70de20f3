"""Write a run's adapters, and go back to an earlier round of it (``flexlora rollback``)."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace

from flexlora.config.resolve import Config
from flexlora.errors import UserError
from flexlora.lora.adapters import Adapter
from flexlora.lora.peft_folder import save_adapter
from flexlora.runs.audit import ADAPTERS, ROLLED_BACK, file_digests
from flexlora.runs.checkpoints import checkpoint_digest, go_back, kept_rounds, remove_later
from flexlora.runs.folder import RunFolder
from flexlora.runs.live_state import INTERRUPTED, read_live, write_live
from flexlora.runs.lock import exclusive_lock
from flexlora.runs.sources import write_origin
from flexlora.server.rounds.late_messages import LateMessages
from flexlora.server.strategy import FlexLoRAStrategy
from flexlora.training.models import resolve_name

__all__ = ["roll_back", "write_adapters"]


def write_adapters(
    run: RunFolder,
    adapters: Mapping[str, Adapter],
    config: Config,
    *,
    server_round: int,
    fingerprint: str,
    fan_in_fan_out: bool,
) -> None:
    """``adapters/NAME`` for every adapter of the state after ``server_round``; the log has digests.

    The folder of a class that no client has any more, as ranks were lowered, is removed.

    Raises:
        UserError: they cannot be written.
    """
    base, root = resolve_name(config.model.name), run.path / "adapters"
    with run.writing("the adapters"):
        for folder in root.glob("*"):
            if folder.is_dir() and folder.name not in adapters:
                shutil.rmtree(folder)
        for name, adapter in adapters.items():
            save_adapter(adapter, root / name, base=base, fan_in_fan_out=fan_in_fan_out)
            write_origin(root / name, fingerprint)
        run.audit.append(ADAPTERS, round=server_round, files=file_digests(root))


def roll_back(target: str, server_round: int) -> RunFolder:
    """Bring the run in the folder ``target`` back to where it stood after ``server_round``.

    The checkpoint of that round becomes the current one by an atomic rename; then the rows of later
    rounds, their checkpoints and what clients of a simulation kept of them are removed, and the
    adapters written anew. A crash before the rename changes nothing; after it, the same command or
    a resume does the rest.

    Raises:
        UserError: no run folder, a run at work, a round that is not kept, a damaged checkpoint, a
            run with a privacy ledger.
    """
    run, config = RunFolder.open(target)
    if config.privacy.mode != "none":
        raise UserError(
            f"'{run.path}' is a run with privacy.mode={config.privacy.mode}: its later rounds have "
            "spent their epsilon, which an earlier ledger does not have. Export an adapter, or "
            "start another run."
        )
    with exclusive_lock(run.path):
        _go_back(run, server_round)
        _forget_later(run, server_round)
        state, by_client = run.load_checkpoint()
        classes = {r.name: r for r in sorted(by_client.values(), key=lambda r: (r.rank, r.name))}
        strategy, sources = FlexLoRAStrategy(config), run.sources()
        adapters = {**strategy.served(state, classes), "global": strategy.global_adapter(state)}
        write_adapters(
            run,
            adapters,
            config,
            server_round=server_round,
            fingerprint=sources.base if sources is not None else "",
            fan_in_fan_out=bool(run.load_notes().get("fan_in_fan_out", False)),
        )
    return run


def _go_back(run: RunFolder, server_round: int) -> None:
    """The line in the log, then the rename.

    Raises:
        UserError: a round that is not kept, a damaged checkpoint, a folder that cannot be written.
    """
    kept = kept_rounds(run.checkpoint)
    if server_round not in kept:
        raise UserError(
            f"'{run.path}' has no checkpoint of round {server_round}, but of "
            f"{', '.join(map(str, kept))}; server.keep-checkpoints is how many are kept."
        )
    now = None if server_round == kept[-1] else server_round
    run.load_checkpoint(now)  # refused before anything is written
    _, digest = checkpoint_digest(run.checkpoint, now)
    _, left = checkpoint_digest(run.checkpoint)
    with run.writing(f"the way back to round {server_round}"):
        was = {"from_round": kept[-1], "from_checkpoint": left}
        run.audit.append(ROLLED_BACK, round=server_round, checkpoint=digest, **was)
        go_back(run.checkpoint, server_round)


def _forget_later(run: RunFolder, server_round: int) -> None:
    """Remove all that later rounds have left; ``rewind`` does the same for the rows."""
    run.rewind(server_round)
    with run.writing("what is left of later rounds"):
        remove_later(run.checkpoint)
        LateMessages.remove_unneeded(run)
        for path in (run.path / "personal").rglob("round-*.safetensors"):
            number = path.stem.removeprefix("round-")
            if number.isdecimal() and int(number) > server_round:
                path.unlink()
        live = read_live(run.path)
        if live is not None:
            cause = f"rolled back to round {server_round}"
            write_live(run.path, replace(live, state=INTERRUPTED, cause=cause, round=server_round))
