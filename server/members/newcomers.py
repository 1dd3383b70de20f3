"""Nodes that the roster does not know: asked what they are, and taken in between two rounds.

A SuperNode with a registered key keeps its node id when it comes back; one without gets another,
and is then found again by its client's own id. A node that did not answer is asked again, after 1,
2, 4 ... rounds; one that answered and does not fit, once it has been away.
"""

from __future__ import annotations

from collections.abc import Mapping

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from flexlora.server.members.roster import Roster
from flexlora.server.transport.clocks import clock_of
from flexlora.server.transport.messages import decode_capability
from flexlora.server.transport.resending import Letter
from flexlora.wire.jobs import Capability

__all__ = ["Newcomers", "query"]

LONGEST_WAIT_SECONDS = 30.0  # for the answer of a node that is new, before a round goes on
MOST_ROUNDS = 64  # between two questions to a node that does not answer


def query(node_id: int) -> Letter:
    """The question what a node can train."""
    return Letter(Message(RecordDict(), dst_node_id=node_id, message_type=MessageType.QUERY))


class Newcomers:
    """Which nodes have been asked, which have answered, whose answers are not settled yet."""

    def __init__(self) -> None:
        self._open: dict[int, Letter] = {}
        self._tried: dict[int, tuple[int, int]] = {}  # node id: questions, the round of the last
        self._answered: set[int] = set()
        self._reports: dict[int, Capability] = {}

    def met(self, reports: Mapping[int, Capability]) -> None:
        """What all nodes said before the first round."""
        for node_id, report in reports.items():
            self._note(node_id, report, 0)

    def _note(self, node_id: int, report: Capability, server_round: int) -> None:
        if report.version:  # it spoke for itself: an error of Flower's names no version
            self._answered.add(node_id)
        else:
            times, _ = self._tried.get(node_id, (0, 0))
            self._tried[node_id] = max(1, times), server_round

    def look(self, grid: Grid, roster: Roster, server_round: int) -> list[int]:
        """Ask every unknown node that is there and due, and read what has been answered by now."""
        here = set(grid.get_node_ids())
        self._answered &= here
        members = {member.node_id for member in roster.members.values()}
        asked = [
            n for n in sorted(here - members - self._answered) if self._is_due(n, server_round)
        ]
        letters = [query(node_id) for node_id in asked]
        ids = list(grid.push_messages([letter.message for letter in letters])) if letters else []
        for letter, message_id in zip(letters, ids, strict=True):
            letter.posted(message_id, 0.0)
            self._open[letter.node_id] = letter
            self._tried[letter.node_id] = (
                self._tried.get(letter.node_id, (0, 0))[0] + 1,
                server_round,
            )
        self._read(grid, server_round)
        return asked

    def _is_due(self, node_id: int, server_round: int) -> bool:
        times, last = self._tried.get(node_id, (0, 0))
        unsettled = node_id in self._reports or node_id in self._open
        return not unsettled and (
            not times or server_round >= last + min(MOST_ROUNDS, 2 ** min(times - 1, 6))
        )

    def _read(self, grid: Grid, server_round: int) -> None:
        for node_id, letter in list(self._open.items()):
            replies = list(grid.pull_messages(letter.open))[:1] if letter.open else []
            if replies or not letter.open:
                del self._open[node_id]
            for reply in replies:
                reply.metadata.__dict__["_src_node_id"] = node_id
                report = decode_capability(reply)
                self._note(node_id, report, server_round)
                self._reports[node_id] = report

    def wait(self, grid: Grid, roster: Roster, server_round: int, seconds: float) -> None:
        """``look``, and give those that were asked now some time to answer."""
        clock = clock_of(grid)
        deadline = clock.now() + min(seconds, LONGEST_WAIT_SECONDS)
        asked = self.look(grid, roster, server_round)
        while any(node_id in self._open for node_id in asked) and clock.now() < deadline:
            clock.wait(deadline)
            self._read(grid, server_round)

    def take(self, grid: Grid, roster: Roster, *, back: bool = False) -> dict[int, Capability]:
        """Reports that can be settled now, ``back``: only of clients that are members already.

        One whose client another node still speaks for waits until that node has gone.
        """
        here = set(grid.get_node_ids())
        settled = {}
        for node_id, report in list(self._reports.items()):
            member = roster.members.get(report.client_id)
            taken = member is not None and member.node_id in here - {node_id}
            if node_id not in here:
                del self._reports[node_id]
            elif not taken and (member is not None or not back):
                settled[node_id] = self._reports.pop(node_id)
        return settled
