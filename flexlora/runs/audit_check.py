"""``flexlora audit``: verify a run's log, and that its checkpoints and adapters are the log's.

The chain shows a line that was changed, inserted or taken out before the last one. What is missing
at the end shows in the checkpoint and the adapters, which are then others than the log's. Whoever
can write the folder can write a whole other log: note the hash of the last line elsewhere, and give
it as ``--head``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexlora.errors import UserError
from flexlora.runs.audit import (
    ADAPTERS,
    AUDIT_FILE,
    FIRST,
    PUBLISHED,
    RESUMED,
    ROLLED_BACK,
    ROUND,
    STARTED,
    file_digests,
    line_digest,
)
from flexlora.runs.checkpoints import checkpoint_digest, kept_rounds, load_checkpoint
from flexlora.runs.folder import RunFolder
from flexlora.runs.outcomes import Outcome

__all__ = ["Findings", "check_log", "print_findings"]


@dataclass(kw_only=True)
class Findings:
    """``lines`` is what the log says, ``notes`` what is unusual, ``problems`` what is wrong."""

    lines: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class _Position:
    """Where the log stands: the round, the digest of every round's last checkpoint."""

    round: int = -1
    checkpoints: dict[int, str] = field(default_factory=dict)
    before: tuple[int, str] | None = None  # what a crash before the commit leaves as the current
    adapters: Mapping[str, str] | None = None


def print_findings(found: Findings) -> None:
    """What the log says, then what is unusual or wrong."""
    for line in found.lines:
        print(line)
    for note in found.notes:
        print(f"note     {note}")
    for problem in found.problems:
        print(f"PROBLEM  {problem}")
    if not found.problems:
        print(f"ok       {len(found.hashes)} lines; the last has the hash {found.hashes[-1]}")


def check_log(run: RunFolder, *, head: str = "") -> Findings:
    """Verify the chain, the order of rounds, the kept checkpoints and the adapters.

    Raises:
        UserError: the run has no log.
    """
    path = run.path / AUDIT_FILE
    if not path.is_file():
        raise UserError(
            f"'{run.path}' has no {AUDIT_FILE}: an older FlexLoRA ran it, or it is gone."
        )
    found, position = Findings(), _Position()
    text = path.read_bytes()
    *lines, cut = text.split(b"\n")
    _follow(lines, found, position)
    if cut:
        found.notes.append("the last line has no end: the run was killed while it was written.")
    if head and head not in found.hashes:
        found.problems.append(
            f"no line has the hash {head}: this is not the log it was noted from."
        )
    _check_checkpoints(run, position, found)
    _check_adapters(run.path / "adapters", position, found)
    return found


def _follow(lines: list[bytes], found: Findings, position: _Position) -> None:
    """Walk the chain; ``position`` is where it ends."""
    previous, torn = FIRST, False
    for number, line in enumerate(lines, start=1):
        row = _parsed(line)
        found.hashes.append(line_digest(line))
        if row is None:
            torn = True
        else:
            if row.get("previous") != previous:
                found.problems.append(
                    f"line {number} follows another line than the one before it: that one was "
                    "changed, or lines were taken out or put in."
                )
            if torn and row.get("event") not in (RESUMED, ROLLED_BACK):
                found.problems.append(
                    f"line {number - 1} cannot be read, and no resume explains it."
                )
            torn = False
            _take(row, number, found, position)
        previous = found.hashes[-1]
    if torn:
        found.problems.append(f"line {len(lines)} cannot be read.")


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _take(row: dict[str, Any], number: int, found: Findings, position: _Position) -> None:
    """One line of the log."""
    event, at, digest = row.get("event"), row.get("round"), str(row.get("checkpoint", ""))
    current = position.round, position.checkpoints.get(position.round, "")
    if event == STARTED:
        if number > 1:
            found.problems.append(f"line {number} starts a run in the middle of its log.")
    elif type(at) is not int:
        found.problems.append(f"line {number} names no round.")
    elif event == ROUND:
        if at != position.round + 1:
            found.problems.append(f"line {number} is round {at} after round {position.round}.")
        position.before = current
        position.round = at
        position.checkpoints[at] = digest
        found.lines.append(_round_line(row))
    elif event in (RESUMED, ROLLED_BACK):
        known = position.checkpoints.get(at)
        if (known is None and number > 1) or known not in (None, digest):
            found.problems.append(
                f"line {number} {event} from a checkpoint of round {at} that is not the log's."
            )
        position.before = current if event == ROLLED_BACK else None
        position.round = at
        position.checkpoints.setdefault(at, digest)
        found.lines.append(f"{event:<9}round {at}, at {row.get('time', '?')}")
    elif event == ADAPTERS:
        files = row.get("files")
        position.adapters = files if isinstance(files, dict) else {}
        found.lines.append(f"adapters of round {at}: {len(position.adapters)} files")
    elif event == PUBLISHED:
        found.lines.append(f"published round {at}, to {row.get('to')}")


def _round_line(row: dict[str, Any]) -> str:
    clients = [entry for entry in row.get("clients", ()) if isinstance(entry, dict)]
    counted = [entry for entry in clients if entry.get("outcome") == Outcome.OK.value]
    names = ", ".join(str(entry.get("client_id")) for entry in counted[:8])
    more = f" and {len(counted) - 8} more" if len(counted) > 8 else ""
    what = f"from {names}{more}" if counted else "no update"
    skipped = f"; {row['skipped']}" if row.get("skipped") else ""
    return f"round {row['round']:<3}checkpoint {str(row.get('checkpoint'))[:12]}, {what}{skipped}"


def _check_checkpoints(run: RunFolder, position: _Position, found: Findings) -> None:
    """Every kept checkpoint has the log's digest, and the current one is where the log ends."""
    try:
        kept = kept_rounds(run.checkpoint)
        for at in kept:
            load_checkpoint(run.checkpoint, None if at == kept[-1] else at)
    except UserError as error:
        if position.round >= 0 or (run.checkpoint / "current.json").exists():
            found.problems.append(str(error))
        return
    current = checkpoint_digest(run.checkpoint)
    ends = position.round, position.checkpoints.get(position.round, "")
    if current == position.before and current != ends:
        found.notes.append(
            f"the log ends with round {position.round}, the checkpoint is that of round "
            f"{current[0]}: the run was stopped in between; a resume goes on from there."
        )
    elif current != ends:
        found.problems.append(
            f"the checkpoint is of round {current[0]} ({current[1][:12]}), the log ends with round "
            f"{ends[0]} ({ends[1][:12] or 'none'})."
        )
    for at in kept[:-1]:
        if checkpoint_digest(run.checkpoint, at)[1] != position.checkpoints.get(at):
            found.problems.append(f"the kept checkpoint of round {at} is not the log's.")


def _check_adapters(folder: Path, position: _Position, found: Findings) -> None:
    there, logged = file_digests(folder), position.adapters or {}
    for name in sorted(there.keys() | logged.keys()):
        if name not in logged:
            found.problems.append(f"adapters/{name} is not in the log.")
        elif name not in there:
            found.problems.append(f"adapters/{name} is gone.")
        elif there[name] != logged[name]:
            found.problems.append(f"adapters/{name} is not the file that the run wrote.")
