"""One array for all adapters of a message: round trips to the bit, refusals in one sentence."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import random_adapter
from flexlora.errors import UpdateRefused, UserError
from flexlora.wire.encoding import (
    FACTORS,
    WireArray,
    decode_adapter,
    encode_adapter,
    encoded_bytes,
)
from flexlora.wire.packing import (
    DATA,
    INDEX,
    MOST_INLINE,
    PACKED,
    VERSION_KEY,
    WIRE_VERSION,
    check_version,
    pack_adapters,
    unpack_adapters,
)

SHAPES = {"attn.q": (6, 12), "attn.v": (5, 12), "mlp.up": (9, 7)}
KINDS = ("float32", "bfloat16", "float64", "int8")


def packed(**adapters):
    """As an array, whatever the size: ``inline`` makes the other form of it."""
    array, index = pack_adapters(adapters)
    if array is None:
        data = index.pop(DATA)
        array = WireArray(dtype="uint8", shape=(len(data),), data=data)
    return {PACKED: array}, index


def inline(arrays, index):
    return {}, {**index, DATA: bytes(arrays[PACKED].data)}


def unpacked(arrays, index, *names):
    return unpack_adapters(arrays, index, names)


def one(dtype="float32"):
    """A packed reply of one adapter, to be damaged."""
    return packed(update=encode_adapter(random_adapter(SHAPES, 2), dtype))


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(KINDS),
    labels=st.sampled_from([FACTORS, ("lora_A",), ("lora_B",)]),
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    change=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_every_adapter_comes_back_as_it_does_from_arrays_of_its_own(
    dtype, labels, ranks, change, seed
):
    """The law: packing is invisible, for every dtype, kind of int8, part and number of adapters."""
    adapters = {f"a{k}": random_adapter(SHAPES, r, seed=seed + k) for k, r in enumerate(ranks)}
    held = {name: a.map(lambda t: t + 1e-3) if change else None for name, a in adapters.items()}
    known = {name: a.map(lambda t: t + 1e-3) for name, a in adapters.items()}
    encoded = {name: encode_adapter(a, dtype, labels, held[name]) for name, a in adapters.items()}
    arrays, index = packed(**encoded)
    assert len(arrays[PACKED].data) == sum(
        encoded_bytes(a, dtype, labels) for a in adapters.values()
    )
    back = unpacked(arrays, index, *adapters)
    assert list(back) == list(adapters)
    for name in adapters:
        apart = decode_adapter(*encoded[name], labels=labels, held=known[name])
        whole = decode_adapter(*back[name], labels=labels, held=known[name])
        assert whole.digest() == apart.digest() and list(whole) == list(apart)
    beside = unpacked(*inline(arrays, index), *adapters)
    for name in adapters:
        views, values = beside[name]
        assert values == back[name][1]
        assert all(views[key].data == array.data for key, array in back[name][0].items())


def test_few_bytes_travel_beside_the_index_and_many_as_an_array():
    adapter = random_adapter({"q": (64, 64)}, 8)
    few, index = pack_adapters({"update": encode_adapter(adapter, "float32")})
    assert few is None and len(index[DATA]) == 4 * 8 * 128
    at_most = random_adapter({"q": (MOST_INLINE // 8 - 64, 64)}, 2)
    array, index = pack_adapters({"update": encode_adapter(at_most, "float32")})
    assert array is None and len(index[DATA]) == MOST_INLINE
    more = random_adapter({"q": (MOST_INLINE // 8 - 63, 64)}, 2)
    array, index = pack_adapters({"update": encode_adapter(more, "float32")})
    assert DATA not in index and len(array.data) == MOST_INLINE + 8


def test_the_factors_are_views_and_the_decoded_ones_are_not():
    """No second copy of the whole; and training in place cannot change the message."""
    arrays, index = one()
    views, values = unpacked(arrays, index, "update")["update"]
    assert all(isinstance(array.data, memoryview) for array in views.values())
    assert {array.data.obj for array in views.values()} == {arrays[PACKED].data}
    before = bytes(arrays[PACKED].data)
    for factors in decode_adapter(views, values).values():
        factors.lora_A.add_(1.0)
    assert bytes(arrays[PACKED].data) == before


def test_the_index_may_lie_in_a_record_with_other_values():
    arrays, index = one()
    assert unpacked(arrays, {"client-id": "a", "modules": 3, **index}, "update")


def with_index(**columns):
    def damage(arrays, index):
        return arrays, {**index, **{f"{PACKED}/{key}": held for key, held in columns.items()}}

    return damage


def with_entry(key, place, value):
    def damage(arrays, index):
        column = list(index[f"{PACKED}/{key}"])
        column[place] = value
        return with_index(**{key: column})(arrays, index)

    return damage


def with_array(**fields):
    from dataclasses import replace

    def damage(arrays, index):
        return {PACKED: replace(arrays[PACKED], **fields)}, index

    return damage


def longer(arrays, index, more=b"\0"):
    data = bytes(arrays[PACKED].data) + more
    return with_array(data=data, shape=(len(data),))(arrays, index)


def shorter(arrays, index):
    data = bytes(arrays[PACKED].data)[:-1]
    return with_array(data=data, shape=(len(data),))(arrays, index)


def without(key):
    def damage(arrays, index):
        return arrays, {k: v for k, v in index.items() if k != f"{PACKED}/{key}"}

    return damage


REFUSED = {
    "a byte too many": (longer, "bytes, the index is for"),
    "a byte too few": (shorter, "bytes, the index is for"),
    "2**62 rows": (with_entry("rows", 0, 2**62), "bytes, the index is for"),
    "2**62 rows of nothing": (
        lambda a, i: with_entry("columns", 0, 0)(*with_entry("rows", 0, 2**62)(a, i)),
        r"has shape \(4611686018427387904, 0\), expected two dimensions from 1 up",
    ),
    "a negative side": (with_entry("rows", 1, -6), "expected two dimensions from 1 up"),
    "two negative sides": (
        lambda a, i: with_entry("columns", 0, -12)(*with_entry("rows", 0, -2)(a, i)),
        "expected two dimensions from 1 up",
    ),
    "an unknown kind": (with_entry("kinds", 2, "float8"), "'attn.v.lora_A' is 'float8'"),
    "a name twice": (with_entry("modules", 1, "attn.q"), "module 'attn.q' comes 2 times"),
    "one kind too few": (with_index(kinds=["float32"] * 5), "has 5 kinds, expected 6"),
    "one row too many": (with_index(rows=[2, 6, 2, 5, 2, 9, 1]), "has 7 rows, expected 6"),
    "alphas that are missing": (with_index(alphas=[16.0]), "has 1 alphas, expected 3"),
    "an adapter of more modules": (with_index(sizes=[4]), r"have \[4\] modules, and 3"),
    "an adapter of none": (with_index(sizes=[0, 3], adapters=["update", "x"]), "expected"),
    "a negative size": (with_index(sizes=[-1]), r"have \[-1\] modules"),
    "another adapter": (with_index(adapters=["trained"]), r"are \[trained\], expected \[update\]"),
    "two adapters": (
        with_index(adapters=["update", "update"], sizes=[1, 2]),
        r"are \[update, update\], expected",
    ),
    "no factor": (with_index(labels=[]), "the factors are"),
    "a factor twice": (with_index(labels=["lora_A", "lora_A"]), "the factors are"),
    "factors the other way": (with_index(labels=["lora_B", "lora_A"]), "the factors are"),
    "another factor": (with_index(labels=["lora_A", "lora_C"]), "the factors are"),
    "text for rows": (with_index(rows=["2"] * 6), "has '2' in 'rows', expected int"),
    "flags for rows": (with_index(rows=[True] * 6), "has True in 'rows', expected int"),
    "a number for a list": (with_index(modules=3), "no list 'modules'"),
    "no array": (lambda a, i: ({}, i), r"the arrays are \[\], expected one named 'packed'"),
    "a second array": (lambda a, i: ({**a, "x": a[PACKED]}, i), "expected one named 'packed'"),
    "another array": (lambda a, i: ({"x": a[PACKED]}, i), r"are \[x\], expected one named"),
    "another dtype": (with_array(dtype="float32"), "expected flexlora.raw/uint8"),
    "a pickle": (with_array(stype="pickle"), "is pickle/uint8"),
    "another shape": (with_array(shape=(2**62, 4, 0)), "of shape"),
    "bytes twice": (
        lambda a, i: (a, inline(a, i)[1]),
        "bytes beside 1 arrays, expected bytes and no",
    ),
    "text for bytes": (lambda a, i: ({}, {**i, DATA: "x"}), "'packed/data' is str beside 0"),
    "a byte too many, beside": (lambda a, i: inline(*longer(a, i)), "bytes, the index is for"),
    "a byte too few, beside": (lambda a, i: inline(*shorter(a, i)), "bytes, the index is for"),
    **{f"no {key}": (without(key), f"no list '{key}'") for key in INDEX},
}


@pytest.mark.parametrize("damage", REFUSED)
def test_what_is_not_a_packed_adapter_is_refused_in_one_sentence(damage):
    change, message = REFUSED[damage]
    with pytest.raises(UpdateRefused, match=message) as caught:
        unpacked(*change(*one()), "update")
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_a_long_list_of_what_a_node_made_up_gives_a_short_sentence():
    arrays, index = one()
    names = [f"{k}" * 1000 for k in range(10_000)]
    for columns in ({"adapters": names}, {"labels": names}, {"modules": names}):
        with pytest.raises(UpdateRefused) as caught:
            unpacked(*with_index(**columns)(arrays, index), "update")
        assert len(str(caught.value)) < 400


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_whatever_the_index_says_it_decodes_or_is_refused(data):
    """Any integers and texts in place of those that were sent: nothing else is ever raised."""
    arrays, index = one(data.draw(st.sampled_from(KINDS)))
    for key in data.draw(st.lists(st.sampled_from(sorted(INDEX)), min_size=1, max_size=3)):
        kind = {int: st.integers(-(2**63), 2**63 - 1), str: st.text(max_size=8)}
        kind |= {float: st.floats(), bool: st.booleans()}
        column = index[f"{PACKED}/{key}"]
        fresh = data.draw(st.lists(kind[INDEX[key]], max_size=len(column) + 1))
        index[f"{PACKED}/{key}"] = [*fresh, *column[len(fresh) :]]
    try:
        views, values = unpacked(arrays, index, "update")["update"]
        decode_adapter(views, values, held=random_adapter(SHAPES, 2))
    except UpdateRefused:
        pass


def test_a_job_of_another_wire_version_is_refused_by_both_numbers():
    check_version({VERSION_KEY: WIRE_VERSION})
    for job in ({}, {VERSION_KEY: WIRE_VERSION + 1}, {VERSION_KEY: "1"}):
        with pytest.raises(UserError, match=f"this node reads {WIRE_VERSION}; update the older"):
            check_version(job)


def test_packing_copies_no_factor_before_the_join():
    adapter = random_adapter(SHAPES, 2, dtype=torch.float32)
    arrays, _ = encode_adapter(adapter, "float32")
    view = torch.frombuffer(arrays["attn.q.lora_A"].data, dtype=torch.float32)
    assert view.data_ptr() == adapter["attn.q"].lora_A.data_ptr()
