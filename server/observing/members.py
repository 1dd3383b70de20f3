"""Write ``RUN/members.json`` (``runs/members_file.py``) at the start and the end of every round."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from flexlora.runs.members_file import FORMAT, MEMBERS_FILE, read_members
from flexlora.runs.outcomes import Outcome
from flexlora.server.fleet.table import moment
from flexlora.server.members.roster import Roster
from flexlora.server.observing.observer import Observer
from flexlora.wire.files import write_atomically

__all__ = ["MembersObserver"]

LOG = logging.getLogger(__name__)
HEARD = (Outcome.OK, Outcome.FAILED, Outcome.REFUSED, Outcome.OUT_OF_MEMORY)


class MembersObserver(Observer):
    """Writes the file from the first round on; a resumed run goes on with the replies in it."""

    def __init__(self, folder: Path, *, resumed: bool = False) -> None:
        self.file = folder / MEMBERS_FILE
        self._roster = Roster()
        before = read_members(self.file)["members"] if resumed else {}
        kept = ("last_reply", "round", "outcome", "cause")
        self._heard = {k: {n: v[n] for n in kept if n in v} for k, v in before.items()}
        self._round = 0

    def met(self, roster: Roster) -> None:
        self._roster = roster

    def round_started(self, server_round: int, num_rounds: int, num_clients: int) -> None:
        self._round = server_round
        self._write()

    def replied(self, client_id: str, outcome: Outcome, cause: str, late: bool) -> None:
        heard = self._heard.setdefault(client_id, {})
        heard |= {"round": self._round, "outcome": outcome.value, "cause": cause}
        if outcome in HEARD:
            heard["last_reply"] = moment()

    def evaluated(self, client_id: str, cause: str) -> None:
        if not cause:
            self._heard.setdefault(client_id, {})["last_reply"] = moment()

    def round_finished(self, metrics: Mapping[str, object]) -> None:
        self._write()

    def _write(self) -> None:
        members = {
            client_id: {
                "node_id": str(member.node_id),
                "rank_class": member.rank_class.name,
                "device": member.capability.device,
                "quantization": member.capability.quantization,
                "version": member.capability.version,
                "wire_version": member.capability.wire_version,
                **self._heard.get(client_id, {}),
            }
            for client_id, member in sorted(self._roster.members.items())
        }
        left_out = dict(sorted(self._roster.left_out.items()))
        table = {"format": FORMAT, "written": moment(), "members": members, "left_out": left_out}
        if not self.file.parent.is_dir():  # no client can train, so there is no run
            return
        try:
            write_atomically(self.file, (json.dumps(table, indent=1) + "\n").encode())
        except OSError as error:
            LOG.warning("%s is not written: %s", self.file, error)
