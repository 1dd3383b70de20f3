"""What a client of a secure sum refuses, and that an identical request gets identical bytes."""

from dataclasses import replace

import numpy as np
import pytest
from flwr.app import RecordDict

from flexlora.clients.secure.answering import answer_phase, mask_request_of
from flexlora.clients.secure.session import ClientSession
from flexlora.clients.secure.session_store import SessionStore
from flexlora.config.resolve import Config
from flexlora.errors import UserError
from flexlora.wire.secure_messages import KeysRequest, from_values, to_values
from secure_round import SecureRound

PLACE = 5  # of rank 7, with 2, 8 and 11


class AtClient:
    """The requests that reach one client of a round, phase by phase."""

    def __init__(self, count=12):
        self.round = SecureRound(count)
        self.round.keys()
        self.graph = self.round.server.shares_requests()[PLACE]
        self.round.shares()
        self.mask = self.round.server.mask_requests()[PLACE]
        self.round.masked(silent={2})
        self.unmask = self.round.server.unmask_requests()[PLACE]
        self.session = self.round.sessions[PLACE]

    def begun(self, *phases):
        """A session that has answered these phases; its root is the one whose boxes are held."""
        known = {"keys", "shares", "mask"} & set(phases)
        asked = {phase: text for phase, text in self.session.asked.items() if phase in known}
        sent = self.session.sent if "mask" in known else b""
        return replace(self.session, asked=asked, sent=sent, _agreed={})

    def masked(self, session, request):
        return session.masked(request, self.round.numbers(PLACE))


@pytest.fixture(scope="module")
def at():
    return AtClient()


def test_an_identical_request_gets_the_identical_reply(at):
    agreed = at.round.agreed()
    first, again = at.begun("keys"), at.begun("keys")
    assert first.shares(at.graph, agreed) == first.shares(at.graph, agreed)
    assert first.shares(at.graph, agreed) == again.shares(at.graph, agreed)
    one, two = at.masked(first, at.mask), at.masked(first, at.mask)
    assert all(np.array_equal(one[band], two[band]) for band in one)
    assert first.unmask(at.unmask) == first.unmask(at.unmask)


def test_a_session_goes_on_from_its_values(at):
    values = RecordDict()
    store = SessionStore()
    store._session, store.last_sent = at.begun("keys", "shares", "mask"), 4
    store.write(values)
    found = SessionStore.of_state(values)
    assert found.last_sent == 4
    session = found.current(at.session.session)
    assert session.unmask(at.unmask) == at.begun("keys", "shares", "mask").unmask(at.unmask)
    assert SessionStore.of_state(RecordDict()).last_sent == 0


def test_secrets_are_in_no_representation(at):
    assert at.session.root.hex() not in repr(at.session) and repr(at.session.root) not in repr(
        at.session
    )


# --- a server that asks twice ------------------------------------------------------------------


def test_another_request_of_the_same_phase_is_refused(at):
    session = at.begun("keys", "shares", "mask")
    others = {
        "shares": lambda: session.shares(
            replace(at.graph, sizes=tuple(s + 1 for s in at.graph.sizes)), at.round.agreed()
        ),
        "mask": lambda: at.masked(
            session, replace(at.mask, alive=at.mask.alive[:-1], boxes=at.mask.boxes[:-1])
        ),
    }
    for phase, ask in others.items():
        with pytest.raises(UserError, match=f"'{phase}' of round 4 a second time and otherwise"):
            ask()
    session.unmask(at.unmask)
    moved = replace(
        at.unmask,
        alive=at.unmask.alive[1:],
        dropped=tuple(sorted((*at.unmask.dropped, at.unmask.alive[0]))),
    )
    with pytest.raises(UserError, match="'unmask' of round 4 a second time"):
        session.unmask(moved)


def test_phases_in_another_order_are_refused(at):
    with pytest.raises(UserError, match="'shares' is asked for before 'keys'"):
        at.begun().shares(at.graph, at.round.agreed())
    with pytest.raises(UserError, match="'shares' of round 4 has not been answered"):
        at.masked(at.begun("keys"), at.mask)
    with pytest.raises(UserError, match="'mask' of round 4 has not been answered"):
        at.begun("keys", "shares").unmask(at.unmask)


def test_a_second_sum_of_a_round_and_an_earlier_round_are_refused(tmp_path):
    marker = tmp_path / "run" / "secure-round"
    store = SessionStore(marker)
    first = KeysRequest(server_round=3, session=b"a" * 16)
    assert store.begin(first) is store.begin(first)
    with pytest.raises(UserError, match="begins round 3 anew"):
        store.begin(KeysRequest(server_round=3, session=b"b" * 16))
    store.note_sent(3)
    later = SessionStore(marker)  # the trainer was started anew
    with pytest.raises(UserError, match="has sent its update of round 3"):
        later.begin(KeysRequest(server_round=3, session=b"c" * 16))
    with pytest.raises(UserError, match="no secrets of this round"):
        later.current(first.session)
    fresh = later.begin(KeysRequest(server_round=4, session=b"d" * 16))
    assert fresh.root != store.current(first.session).root


def test_training_that_gives_other_numbers_is_not_masked_again(at):
    session = at.begun("keys", "shares")
    at.masked(session, at.mask)

    def other(graph, mask, generator):
        numbers = at.round.numbers(PLACE)(graph, mask, generator)
        return {band: values + np.uint32(1) for band, values in numbers.items()}

    with pytest.raises(UserError, match="training it again gave other numbers"):
        session.masked(at.mask, other)


# --- values that are refused -------------------------------------------------------------------

GRAPHS = {
    "the server's seed is 12": lambda g: replace(g, seed=12),
    "the server's clip is 3.0": lambda g: replace(g, clip=3.0),
    "the server's min-group is 2": lambda g: replace(g, min_group=2),
    "5 of 11 shares open a secret, expected more than half": lambda g: replace(g, threshold=5),
    "12 of 11 shares": lambda g: replace(g, threshold=12),
    "do not fit": lambda g: replace(g, masks=g.masks[:-1]),
    "lists do not": lambda g: replace(g, bands=(*g.bands[:-1], 0)),
    "without keys, or the client itself": lambda g: replace(g, place=g.peers[0]),
    "another one of it": lambda g: replace(g, session=b"x" * 16),
    "a session of round 4": lambda g: replace(g, server_round=5),
    "public key is none": lambda g: replace(g, channels=bytes(len(g.channels))),
}


@pytest.mark.parametrize("words", GRAPHS)
def test_a_graph_that_does_not_fit_is_refused(at, words):
    with pytest.raises(UserError, match=words):
        at.begun("keys").shares(GRAPHS[words](at.graph), at.round.agreed())


def test_a_graph_smaller_than_the_group_is_refused(at):
    agreed = replace(at.round.agreed(), min_group=13)
    with pytest.raises(UserError, match="band 0 would sum 12 clients, expected at least 13"):
        at.begun("keys").shares(replace(at.graph, min_group=13), agreed)


MASKS = {
    "no neighbours, or twice": lambda m: replace(m, alive=(*m.alive, 77)),
    "expected 0 first": lambda m: replace(m, bands=m.bands[1:]),
    "3 neighbours hold shares": lambda m: replace(m, alive=m.alive[:3], boxes=m.boxes[:3]),
    "10 boxes came, expected 11": lambda m: replace(m, boxes=m.boxes[1:]),
    "11 of 11 boxes with shares do not open": lambda m: replace(
        m, boxes=tuple(box[::-1] for box in m.boxes)
    ),
}


@pytest.mark.parametrize("words", MASKS)
def test_a_mask_request_that_does_not_fit_is_refused(at, words):
    with pytest.raises(UserError, match=words):
        at.masked(at.begun("keys", "shares"), MASKS[words](at.mask))


def test_one_box_that_does_not_open_costs_one_share(at):
    session = at.begun("keys", "shares")
    boxes = (at.mask.boxes[0][::-1], *at.mask.boxes[1:])
    at.masked(session, replace(at.mask, boxes=boxes))
    whole = at.begun("keys", "shares", "mask").unmask(at.unmask)
    reply = session.unmask(at.unmask)
    assert reply.seeds[0] == b"" and reply.seeds[1:] == whole.seeds[1:] and all(whole.seeds)


UNMASKS = {
    "said to have answered and to have dropped out": lambda u: replace(
        u, dropped=(*u.dropped, u.alive[0])
    ),
    "not those that were asked": lambda u: replace(u, alive=u.alive[1:]),
    "5 neighbours answered, expected at least 6": lambda u: replace(
        u, alive=u.alive[:5], dropped=tuple(sorted((*u.alive[5:], *u.dropped)))
    ),
}


@pytest.mark.parametrize("words", UNMASKS)
def test_an_unmask_request_that_does_not_fit_is_refused(at, words):
    with pytest.raises(UserError, match=words):
        at.begun("keys", "shares", "mask").unmask(UNMASKS[words](at.unmask))


def test_a_band_of_too_few_is_not_opened(at):
    """Of the four of rank 7 one was silent; with one less two would be left."""
    request = replace(
        at.unmask,
        alive=tuple(p for p in at.unmask.alive if p != 11),
        dropped=tuple(sorted((*at.unmask.dropped, 11))),
    )
    with pytest.raises(UserError, match="band 2 would sum 2 clients, expected at least 3"):
        at.begun("keys", "shares", "mask").unmask(request)
    fewer = replace(request, bands=(0, 1))
    assert at.begun("keys", "shares", "mask").unmask(fewer).keys


# --- configurations ----------------------------------------------------------------------------


def test_a_secure_client_sends_no_plain_update_and_a_plain_one_no_masked():
    plain = Config.of({})
    secure = plain.with_values(
        {"method.name": "basis", "privacy.mode": "secure", "privacy.clip": 1.0}
    )
    assert mask_request_of({"job": {}}, plain) is None
    with pytest.raises(UserError, match="asks for an update that is not masked"):
        mask_request_of({"job": {}}, secure)
    with pytest.raises(UserError, match=r"privacy\.mode=none"):
        mask_request_of({"job": {}, "secure": {}}, plain)
    with pytest.raises(UserError, match=r"privacy\.mode=none"):
        answer_phase({"phase": "keys"}, plain, SessionStore())
    with pytest.raises(UserError, match="the phase is 'other'"):
        answer_phase({"phase": "other"}, secure, SessionStore())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"session": b"short"}, "'session' has 5 bytes, expected 16"),
        ({"server-round": "1"}, "'server-round' is str, expected int"),
        ({"server-round": -1}, "expected 0 to"),
        ({"server-round": True}, "'server-round' is bool"),
    ],
)
def test_values_of_another_type_are_refused(change, words):
    values = to_values(KeysRequest(server_round=1, session=b"s" * 16))
    with pytest.raises(ValueError, match=words):
        from_values(KeysRequest, values | change)
    with pytest.raises(ValueError, match="'session' is missing"):
        from_values(KeysRequest, {"server-round": 1})


def test_sessions_have_secrets_of_their_own():
    request = KeysRequest(server_round=1, session=b"s" * 16)
    replies = [ClientSession.begun(request).keys(request) for _ in range(2)]
    assert len({key for reply in replies for key in (reply.channel, reply.mask)}) == 4
