"""One poll for all replies; whatever a node uploads is a message or a cause, within its limit."""

from __future__ import annotations

import json
import logging

import pytest
from flwr.app import Message, RecordDict
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_id,
    get_object_tree,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora.errors import UpdateRefused
from flexlora.server.transport.flower_private import MOST_OBJECTS, UNREADABLE, set_message_id
from flexlora.server.transport.inflating import Unreadable, inflated
from flexlora.server.transport.messages import (
    decode_capability,
    decode_eval_result,
    decode_train_result,
)
from flexlora.server.transport.pulling import pull
from flexlora.server.transport.retry_queue import REPORT_BYTES, PendingMessage
from superlink_store import (
    LIMIT,
    content,
    exchanged_with,
    messages,
    patient_grid,
    status,
    taken,
    written,
)


@pytest.fixture
def grid(monkeypatch):
    return patient_grid(monkeypatch)


def test_one_poll_asks_for_all_and_replies_are_read_in_the_order_of_the_messages(grid):
    pending = messages(4)
    for k in (3, 0, 2):
        grid.store.reply(pending[k].message, content(100 + k))
    replies = taken(grid, pending)
    assert grid.store.asked == [["m-0", "m-1", "m-2", "m-3"]]
    assert [key for _, key, _ in replies] == ["m-0", "m-2", "m-3"]
    assert [len(r.content["a"]["a"].data) for *_, r in replies] == [100, 102, 103]
    assert [p.node_id for p, *_ in replies] == [10, 12, 13]
    assert len(grid.store.confirmed) == 3


def test_one_reply_is_pulled_at_a_time_and_what_is_not_taken_comes_again(grid):
    pending = messages(3)
    for p in pending:
        grid.store.reply(p.message, content())
    replies = pull(grid, [(p, key) for p in pending for key in p.open])
    next(replies)
    assert grid.store.calls.count("object") == 6  # message, records, report, arrays, array, chunk
    replies.close()
    assert [key for _, key, _ in taken(grid, pending[1:])] == ["m-1", "m-2"]
    assert grid.store.asked == [["m-0", "m-1", "m-2"]]  # they had been handed over


def test_a_reply_whose_node_still_uploads_it_holds_up_nobody(grid):
    pending = messages(2)
    late = grid.store.reply(pending[0].message, content(), missing=("Message", "ArrayChunk"))
    grid.store.reply(pending[1].message, content(7))
    assert [key for _, key, _ in taken(grid, pending)] == ["m-1"]
    before = len(grid.store.calls)
    assert taken(grid, pending[:1]) == [] and len(grid.store.calls) == before  # not at once again
    grid.store.objects |= late
    grid.clock.seconds += 60.0
    assert [key for _, key, _ in taken(grid, pending[:1])] == ["m-0"]


def array_of(body, children=()):
    return written("Array", children, json.dumps(body).encode())


def tree_of(parts, root):
    return ObjectTree(
        object_id=root, children=[ObjectTree(object_id=k) for k in parts if k != root]
    )


def handed(grid, pending, *contents):
    """Objects of which the first is the reply."""
    parts = {get_object_id(part): part for part in contents}
    root = next(iter(parts))
    grid.store.hand_over(pending.message, root, tree_of(parts, root), parts)


def bomb():
    """A chunk of 4 KB that an array names 100,000 times."""
    chunk = written("ArrayChunk", (), b"x" * 4096)
    body = {"dtype": "u", "shape": [1], "stype": "s", "arraychunk_ids": [0] * 100_000}
    array = array_of(body, [get_object_id(chunk)])
    record = written("ArrayRecord", [get_object_id(array)], b'{"a": 0}')
    records = written("RecordDict", [get_object_id(record)], b'{"a": 0}')
    return [written("Message", [get_object_id(records)]), records, record, array, chunk]


MALFORMED = {
    "junk with a valid hash": [written("Message", (), b"\xff" * 50)],
    "no head at all": [b"\0\0\0"],
    "nothing but a head": [b"Message"],
    "an unknown type": [written("Pickle", (), b"cos\nsystem")],
    "no message": [written("ConfigRecord", (), b"")],
    "a missing child": [written("Message", ["f" * 64])],
    "a length that is text": [b"Message  many\0"],
    "a chunk that is named without end": bomb(),
    "a negative place": [
        written("Message", ["f" * 64]),
        array_of({"dtype": "u", "shape": [1], "stype": "s", "arraychunk_ids": [-1]}),
    ],
    "a body that is no JSON": [written("Message", ["f" * 64]), written("Array", (), b"{{{")],
    "JSON of a hundred thousand brackets": [
        written("Message", ["f" * 64]),
        written("Array", (), b"[" * 100_000),
    ],
}


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_objects_are_an_error_in_the_place_of_that_nodes_reply(what, grid, caplog):
    """Beside two honest nodes, whose replies come whole."""
    pending = messages(3)
    handed(grid, pending[1], *MALFORMED[what])
    for k in (0, 2):
        grid.store.reply(pending[k].message, content())
    with caplog.at_level(logging.WARNING):
        replies = {key: reply for _, key, reply in taken(grid, pending)}
    assert not replies["m-0"].has_error() and not replies["m-2"].has_error()
    error = replies["m-1"].error
    assert error.code == UNREADABLE and error.reason and len(error.reason) <= 300
    assert "node 11: " in caplog.text and len(grid.store.confirmed) == 3
    with pytest.raises(UpdateRefused, match=r"^(unreadable reply|arrays of)"):
        decode_train_result(replies["m-1"])
    assert decode_capability(replies["m-1"]).cause == error.reason
    assert decode_eval_result(replies["m-1"]).cause == error.reason


def test_a_cycle_of_objects_is_unreadable():
    contents = {"a": written("RecordDict", ["b"]), "b": written("RecordDict", ["a"])}
    with pytest.raises(Unreadable, match="unreadable reply"):
        inflated("a", contents, LIMIT)


def test_a_chain_of_a_hundred_thousand_objects_is_unreadable():
    contents = {str(k): written("RecordDict", [str(k + 1)]) for k in range(100_000)}
    with pytest.raises(Unreadable, match="RecursionError"):
        inflated("0", contents, 2**40)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_is_changed_in_the_objects_it_is_a_message_or_unreadable(data):
    """3,761 of 26,000 such changes raised in Flower's own inflate."""
    ask = Message(RecordDict(), dst_node_id=1, message_type="train")
    set_message_id(ask, "m")
    honest = Message(content(40), reply_to=ask)
    parts = {name: part.deflate() for name, part in get_all_nested_objects(honest).items()}
    places = st.tuples(st.integers(0, 5), st.integers(0, 400), st.integers(0, 9))
    for which, at, length in data.draw(st.lists(places, min_size=1, max_size=4)):
        name = list(parts)[which]
        part = bytearray(parts[name])
        at %= len(part)
        part[at : at + length] = data.draw(st.binary(max_size=9))
        parts[name] = bytes(part)
    try:
        assert isinstance(inflated(honest.object_id, parts, LIMIT), Message)
    except Unreadable as error:
        assert "\n" not in str(error)


def test_a_reply_beyond_its_limit_is_not_read_further(grid, caplog):
    pending = messages(2)
    grid.store.reply(pending[0].message, content(30 * 2**20))
    grid.store.reply(pending[1].message, content())
    replies = {key: reply for _, key, reply in taken(grid, pending)}
    reason = replies["m-0"].error.reason
    assert f"expected at most {LIMIT:,}" in reason and "reply of " in reason
    assert not replies["m-1"].has_error() and len(grid.store.confirmed) == 2
    assert "node 10: reply of" in caplog.text


def test_the_limit_counts_all_objects_of_a_reply(grid):
    """Many small ones weigh as much as a large one; and too many are not even asked for."""
    (pending,) = messages(1)
    chunks = [written("ArrayChunk", (), bytes([k]) * 2**18) for k in range(6)]
    handed(grid, pending, written("Message", ["f" * 64]), *chunks)
    ((_, _, reply),) = taken(grid, [pending])
    assert "expected at most" in reply.error.reason
    (pending,) = messages(1)
    many = [written("ArrayChunk", (), b"%d" % k) for k in range(MOST_OBJECTS + 10)]
    handed(grid, pending, written("Message", ["f" * 64]), *many)
    before = len(grid.store.calls)
    ((_, _, reply),) = taken(grid, [pending])
    assert reply.error.reason == f"reply of more than {MOST_OBJECTS:,} objects"
    assert grid.store.calls[before:] == ["poll", "confirm"]


def test_an_object_that_the_superlink_lost_is_a_lost_message(grid):
    (pending,) = messages(1)
    grid.store.reply(pending.message, content())
    grid.store.objects.clear()
    ((_, _, reply),) = taken(grid, [pending])
    assert reply.error.code in {3, 4} and "broke off" in reply.error.reason


def test_a_liar_cannot_answer_for_another(grid):
    """The message that a reply answers is the SuperLink's word, not that of its object."""
    honest, liar = messages(2)
    forged = Message(content(13), reply_to=honest.message)
    parts = {name: part.deflate() for name, part in get_all_nested_objects(forged).items()}
    grid.store.hand_over(liar.message, forged.object_id, get_object_tree(forged), parts)
    grid.store.reply(honest.message, content(100))
    exchanged = {
        p.node_id: (len(r.content["a"]["a"].data), r.metadata.src_node_id)
        for p, r in exchanged_with(grid, [honest, liar])
    }
    assert exchanged == {10: (100, 10), 11: (13, 11)}


def test_after_a_failed_poll_fewer_are_asked_for_at_a_time_and_others_first(grid):
    """One reply that the SuperLink cannot hand over takes few others with it."""
    pending = messages(8)
    for p in pending:
        grid.store.reply(p.message, content())
    found, honest = [], grid.store.pull_messages

    def poisoned(request):
        if "m-0" in request.message_ids:
            raise status(500)
        return honest(request)

    grid.store.pull_messages = poisoned
    for _ in range(12):
        found += [
            key for _, key, _ in taken(grid, [p for p in pending if not set(p.open) & set(found)])
        ]
    assert sorted(found) == [f"m-{k}" for k in range(1, 8)]


def test_reports_have_a_limit_of_their_own():
    assert PendingMessage(
        Message(RecordDict(), dst_node_id=1, message_type="query")
    ).most_bytes == (REPORT_BYTES)
