"""Contents as parts, and the committed stubs against the .proto file."""

from __future__ import annotations

import re
import tracemalloc

import pytest
from flwr.app import MetricRecord, RecordDict
from google.protobuf.descriptor import FieldDescriptor

from federation import ROOT
from flexlora.clients.trainer import trainer_pb2
from flexlora.clients.trainer.content_codec import (
    PART_BYTES,
    ContentRefused,
    array_bytes,
    array_parts,
    decode_content,
    decode_entries,
    encode_entries,
    encode_header,
)
from flexlora.clients.trainer.trainer_pb2 import Content
from trainers import content_of


@pytest.mark.parametrize(
    "sizes",
    [(), (0,), (5, 0, 7), (PART_BYTES,), (PART_BYTES - 1, 2), (3 * PART_BYTES + 5, 1, PART_BYTES)],
)
def test_a_content_comes_back_as_it_went_in_parts_that_are_small_enough(sizes):
    content = content_of(*sizes)
    header, parts = encode_header(content), list(array_parts(content))
    assert array_bytes(header) == sum(sizes) + 3 == sum(map(len, parts))
    assert all(0 < len(part) <= PART_BYTES for part in parts)
    assert all(len(part) == PART_BYTES for part in parts[:-1])
    back = decode_content(Content.FromString(header.SerializeToString()), parts)
    assert list(back) == list(content)
    assert back["arrays"] == content["arrays"] and back["more"] == content["more"]
    first, second = (dict(held["values"]) for held in (content, back))
    assert repr(first) == repr(second)  # a nan is not equal to itself
    assert [type(value) for value in first.values()] == [type(v) for v in second.values()]


def test_parts_may_be_cut_anywhere():
    content = content_of(1000, 70_000)
    whole = b"".join(array_parts(content))
    pieces = [whole[at : at + 777] for at in range(0, len(whole), 777)]
    assert decode_content(encode_header(content), pieces)["arrays"] == content["arrays"]


def test_neither_side_holds_a_second_copy_of_the_whole():
    """A sender holds a part beside the arrays; a receiver the pieces of one array beside them."""
    large = 4 * PART_BYTES
    content = content_of(*[large] * 8)
    header = encode_header(content)
    tracemalloc.start()
    try:
        assert sum(map(len, array_parts(content))) == 8 * large + 3
        assert tracemalloc.get_traced_memory()[1] < 4 * PART_BYTES
        tracemalloc.reset_peak()
        back = decode_content(header, array_parts(content))
        assert tracemalloc.get_traced_memory()[1] < 8 * large + 2 * large
    finally:
        tracemalloc.stop()
    assert back["arrays"] == content["arrays"]


def test_what_has_no_place_in_a_header_is_refused():
    with pytest.raises(ContentRefused, match="'m' is MetricRecord, expected arrays or values"):
        encode_header(RecordDict({"m": MetricRecord({"loss": 1.0})}))
    with pytest.raises(ContentRefused, match=r"'x' is None, expected a scalar"):
        encode_entries({"x": None})
    with pytest.raises(ContentRefused, match=r"'x' is \[1, 'a'\], expected a list of one type"):
        encode_entries({"x": [1, "a"]})


def test_headers_that_say_a_thing_twice_or_nothing_are_refused():
    header = encode_header(content_of(4))
    for index, words in ((0, "record 'values' comes twice"), (1, "record 'arrays' comes twice")):
        double = Content.FromString(header.SerializeToString())
        double.records.append(double.records[index])
        with pytest.raises(ContentRefused, match=words):
            decode_content(double, array_parts(content_of(4)))
    entries = encode_entries({"a": 1})
    with pytest.raises(ContentRefused, match="'a' comes twice"):
        decode_entries([*entries, *entries])
    with pytest.raises(ContentRefused, match="'a' comes without a value"):
        decode_entries([trainer_pb2.Entry(key="a")])
    with pytest.raises(ContentRefused, match="the record 'r' holds nothing"):
        decode_content(Content(records=[trainer_pb2.Record(name="r")]), [])


def declared(text):
    """Messages and calls of a .proto: ``{field: (number, type, repeated, oneof)}`` by message."""
    text = re.sub(r"//[^\n]*", "", text)
    messages = {}
    for name, body in re.findall(r"message (\w+) \{((?:[^{}]|\{[^{}]*\})*)\}", text):
        fields = {}
        oneofs = re.findall(r"oneof (\w+) \{([^{}]*)\}", body)
        plain = re.sub(r"oneof \w+ \{[^{}]*\}", "", body)
        for oneof, part in [("", plain), *oneofs]:
            for repeated, kind, field, number in re.findall(
                r"(repeated )?([\w.]+) (\w+) = (\d+);", part
            ):
                fields[field] = (int(number), kind, bool(repeated), oneof)
        messages[name] = fields
    calls = {
        name: (bool(a), asked, bool(b), answered)
        for name, a, asked, b, answered in re.findall(
            r"rpc (\w+)\((stream )?(\w+)\) returns \((stream )?(\w+)\)", text
        )
    }
    return messages, calls


def generated():
    """The same of the committed stubs."""
    scalars = {
        value: name.removeprefix("TYPE_").lower()
        for name, value in vars(FieldDescriptor).items()
        if name.startswith("TYPE_")
    }
    file = trainer_pb2.DESCRIPTOR
    messages = {
        name: {
            field.name: (
                field.number,
                field.message_type.name if field.message_type else scalars[field.type],
                field.is_repeated,
                field.containing_oneof.name if field.containing_oneof else "",
            )
            for field in message.fields
        }
        for name, message in file.message_types_by_name.items()
    }
    (service,) = file.services_by_name.values()
    calls = {
        method.name: (
            bool(method.client_streaming),
            method.input_type.name,
            bool(method.server_streaming),
            method.output_type.name,
        )
        for method in service.methods
    }
    return messages, calls


def test_the_committed_stubs_are_those_of_the_proto_file():
    text = (ROOT / "clients" / "trainer" / "trainer.proto").read_text()
    messages, calls = declared(text)
    assert (messages, calls) == generated()
    assert len(messages) == 19 and calls["Train"] == (True, "Question", True, "Answer")
    for old, new in (("uint64 run_id = 3", "uint64 run_id = 4"), ("sint64 whole", "int64 whole")):
        assert old in text and declared(text.replace(old, new)) != generated()
