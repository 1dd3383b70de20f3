"""The replies of a secure sum for ``reply_fuzz``: each is added to the sum that waits for it.

What passes is looked at by other means. Keys must agree with another key; shares must be as many
boxes as there are holders; masked numbers must have their length and session; and after shares of
seeds and keys the sum must be the plain one to the bit, or there must be none.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from flexlora.clients.messages import encode_train_result
from flexlora.clients.secure.request_checks import Agreed
from flexlora.clients.secure.session import ClientSession
from flexlora.errors import UpdateRefused
from flexlora.lora.ranks import RankClass
from flexlora.privacy.secure.masks import KEY_BYTES, shared_keys
from flexlora.privacy.secure.packing import pack_bits
from flexlora.server.rounds.secure_secrets import SumFailed
from flexlora.server.rounds.secure_sum import SecureSum, Terms
from flexlora.server.transport.secure_messages import decode_masked, decode_phase
from flexlora.wire.encoding import RAW
from flexlora.wire.jobs import TrainResult
from flexlora.wire.secure_messages import (
    MASKED,
    SECURE,
    KeysReply,
    MaskedNote,
    SharesReply,
    UnmaskReply,
    to_values,
)

__all__ = ["SECURE_KINDS", "judged_secure", "secure_replies"]

SHAPES = {"layers.0.q": (6, 8), "layers.0.v": (3, 8), "layers.1.q": (6, 8)}
SECURE_KINDS = ("secure keys", "secure shares", "secure masked", "secure unmask")
CLIENTS, PLACE, SILENT = 5, 1, 5


@dataclass(kw_only=True)
class _Recorded:
    """The server before each reply of one client, the replies, and the plain sums of the rest."""

    servers: dict[str, SecureSum]
    replies: dict[str, RecordDict]
    totals: dict[int, np.ndarray]


@cache
def _recorded() -> _Recorded:
    """One round of five clients, of which one is silent after its shares."""
    classes = {place: RankClass.of(3) for place in range(1, CLIENTS + 1)}
    terms = Terms(server_round=3, seed=1, clip=1.0, largest=10, min_group=3)
    server, agreed = SecureSum(terms, classes, SHAPES), Agreed(seed=1, clip=1.0, min_group=3)
    found = _Recorded(servers={}, replies={}, totals={})
    sessions = {}

    def record(kind: str, place: int, content: RecordDict) -> None:
        if place == PLACE:
            found.servers[kind], found.replies[kind] = copy.deepcopy(server), content

    for place, begin in server.keys_requests().items():
        sessions[place] = ClientSession.begun(begin)
        keys = sessions[place].keys(begin)
        record("secure keys", place, _phase(keys))
        server.add_keys(place, keys)
    for place, graph in server.shares_requests().items():
        shares = sessions[place].shares(graph, agreed)
        record("secure shares", place, _phase(shares))
        server.add_shares(place, shares)
    for place, mask in server.mask_requests().items():
        plan, draws = server.plan, np.random.default_rng(place)
        plain = {0: draws.integers(0, 50, plan.length(0)).astype(np.uint32)}
        made = sessions[place].masked(mask, lambda *_, plain=plain: {0: plain[0].copy()})
        data = pack_bits(made[0], plan.grids[0].bits)
        record("secure masked", place, _masked(server, data))
        if place != SILENT:
            server.add_masked(place, data)
            found.totals[0] = found.totals.get(0, 0) + plain[0].astype(np.int64)
    for place, unmask in server.unmask_requests().items():
        reply = sessions[place].unmask(unmask)
        record("secure unmask", place, _phase(reply))
        if place != PLACE:
            server.add_unmask(place, reply)
    found.servers["secure unmask"] = server
    return found


def _phase(reply: object) -> RecordDict:
    return RecordDict({SECURE: ConfigRecord(to_values(reply))})


def _masked(server: SecureSum, data: bytes) -> RecordDict:
    result = TrainResult(
        client_id="client_1", rank_class="rank_3", base_round=2, digest="d" * 32, num_examples=4
    )
    content = encode_train_result(result, dtype="float32")
    note = MaskedNote(server_round=server.terms.server_round, session=server.session)
    content[SECURE] = ConfigRecord(to_values(note))
    content[MASKED] = ArrayRecord({MASKED: Array("uint8", (len(data),), RAW, data)})
    return content


def secure_replies() -> Mapping[str, RecordDict]:
    """By kind, as a node sends them."""
    return _recorded().replies


def judged_secure(kind: str, reply: Any) -> tuple[str, str]:
    """What the server makes of a reply, and what is wrong with that: empty if nothing."""
    recorded = _recorded()
    server = copy.deepcopy(recorded.servers[kind])
    kinds = {"secure keys": KeysReply, "secure shares": SharesReply, "secure unmask": UnmaskReply}
    try:
        if kind == "secure masked":
            result, note, data = decode_masked(reply)
            if note is None:
                return "failed", ""
        else:
            decoded: Any = decode_phase(reply, kinds[kind])
    except UpdateRefused:
        return "failed", ""
    try:
        if kind == "secure keys":
            server.add_keys(PLACE, decoded)
            return "accepted", _odd_keys(decoded, server)
        if kind == "secure shares":
            server.add_shares(PLACE, decoded)
            return "accepted", _odd_shares(decoded, server)
        if kind == "secure masked":
            assert note is not None
            server.check_session(note)
            server.add_masked(PLACE, data)
            return "accepted", _odd_numbers(result, note, data, server)
        server.add_unmask(PLACE, decoded)
    except UpdateRefused:
        return "refused", ""
    return "accepted", _odd_sum(server, recorded.totals)


def _odd_keys(reply: KeysReply, server: SecureSum) -> str:
    for key in (reply.channel, reply.mask):
        if len(shared_keys(b"k" * KEY_BYTES, [key])[0]) != KEY_BYTES:
            return "a key that agrees with nobody"
    return "" if reply.session == server.session else "another session"


def _odd_shares(reply: SharesReply, server: SecureSum) -> str:
    shaped = len(reply.boxes) == CLIENTS - 1 and len(reply.digests) == 1
    same = (reply.server_round, reply.session) == (server.terms.server_round, server.session)
    return "" if shaped and same else f"{len(reply.boxes)} boxes or another session"


def _odd_numbers(result: TrainResult, note: MaskedNote, data: bytes, server: SecureSum) -> str:
    if len(data) != server.most_bytes(PLACE) or note.session != server.session:
        return f"{len(data)} bytes, or another session"
    words = (result.note, result.client_id, result.rank_class)
    return next((f"{w[:40]!r}" for w in words if not w.isprintable()), "")


def _odd_sum(server: SecureSum, totals: Mapping[int, np.ndarray]) -> str:
    """The sum is the plain one, whatever shares came; the decoded one may be refused."""
    try:
        server.opened()
    except SumFailed:
        return ""
    size = 2 ** server.plan.grids[0].bits
    same = np.array_equal(server.totals[0].astype(np.int64) % size, totals[0] % size)
    return "" if same else "another sum than the plain one"
