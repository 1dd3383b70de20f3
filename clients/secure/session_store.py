"""Where a client's session stays between the messages of a round.

A resident trainer and a simulation hold it in memory: secrets touch no disk. A ClientApp without a
trainer is a new process for every message, and has it in the run's state, which Flower's SuperNode
holds in memory too. The number of the last round whose update was sent outlives the session, and
with a ``marker`` also the process: a round is never summed twice.
"""

from __future__ import annotations

from pathlib import Path

from flwr.app import ConfigRecord, RecordDict

from flexlora.clients.secure.session import ClientSession
from flexlora.errors import UserError
from flexlora.wire.files import write_atomically
from flexlora.wire.secure_messages import KeysRequest

__all__ = ["SessionStore"]

STATE = "flexlora.secure"  # the record in a run's state


class SessionStore:
    """The session of one client in one run, and the last round whose update it sent."""

    def __init__(self, marker: Path | None = None) -> None:
        self._session: ClientSession | None = None
        self._marker, self.last_sent = marker, 0
        if marker is not None and marker.is_file():
            self.last_sent = int(marker.read_text(encoding="utf-8"))

    def begin(self, request: KeysRequest) -> ClientSession:
        """A session with new keys, or the one of this request.

        Raises:
            UserError: an earlier round, another session of the same round, or a round whose update
                was sent.
        """
        known = self._session
        if known is not None and known.session == request.session:
            return known
        if known is not None and request.server_round <= known.server_round:
            raise UserError(
                f"the server begins round {request.server_round} anew, this client is in round "
                f"{known.server_round} of the run and answers once."
            )
        if request.server_round <= self.last_sent:
            raise UserError(
                f"this client has sent its update of round {self.last_sent}; a second sum with it "
                "could show it."
            )
        self._session = ClientSession.begun(request)
        return self._session

    def current(self, session: bytes) -> ClientSession:
        """The session that was begun under this name.

        Raises:
            UserError: there is none here.
        """
        if self._session is None or self._session.session != session:
            raise UserError(
                "this client has no secrets of this round; was it, or its trainer, started anew?"
            )
        return self._session

    def note_sent(self, server_round: int) -> None:
        """The update of this round leaves now."""
        self.last_sent = max(self.last_sent, server_round)
        if self._marker is not None:
            self._marker.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._marker, str(self.last_sent).encode())

    @classmethod
    def of_state(cls, state: RecordDict) -> SessionStore:
        """From a run's state, where ``write`` has put it."""
        store = cls()
        record = state.config_records.get(STATE)
        if record is not None:
            store.last_sent = int(record["last-sent"])  # type: ignore[arg-type]
            if "root" in record:
                store._session = ClientSession.of_values(record)
        return store

    def write(self, state: RecordDict) -> None:
        """Into a run's state, for the next process."""
        values = self._session.to_values() if self._session is not None else {}
        state[STATE] = ConfigRecord({"last-sent": self.last_sent, **values})
