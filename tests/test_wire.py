"""Adapters on the wire: exact where the dtype allows it, and nothing odd gets past the decoder."""

from dataclasses import replace

import pytest
import torch
from builders import random_adapter

from flexlora.adapters import Adapter
from flexlora.errors import UpdateRefused
from flexlora.wire import FACTORS, decode_adapter, encode_adapter, over_the_wire


@pytest.fixture
def adapter(shapes):
    return random_adapter(
        shapes, rank=[2, 4, 3], alpha=[16.0, 7.5], rslora=True, dtype=torch.float32
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_lossless_wire_changes_no_bit(shapes, dtype):
    adapter = random_adapter(shapes, rank=[2, 4, 3], dtype=getattr(torch, dtype))
    assert over_the_wire(adapter, dtype).digest() == adapter.digest()


def test_scaling_and_names_travel_with_the_arrays(adapter):
    back = over_the_wire(adapter, "float32")
    for name, factors in adapter.items():
        assert (back[name].alpha, back[name].rslora) == (factors.alpha, True)
        assert back[name].scaling == factors.scaling


def test_factors_told_apart_by_name_where_rank_equals_the_dimensions():
    """Trap T5: with rank = out = in the two factors have the same shape."""
    adapter = random_adapter({"square": (5, 5)}, rank=5, dtype=torch.float32)
    back = over_the_wire(adapter, "float32")["square"]
    assert torch.equal(back.lora_A, adapter["square"].lora_A)
    assert torch.equal(back.lora_B, adapter["square"].lora_B)


def test_bfloat16_halves_the_bytes_and_decodes_to_the_rounded_float32(adapter):
    arrays, values = encode_adapter(adapter, "bfloat16")
    assert sum(len(array.data) for array in arrays.values()) == adapter.num_bytes // 2
    back = decode_adapter(arrays, values)
    rounded = adapter.map(lambda tensor: tensor.to(torch.bfloat16).to(torch.float32))
    assert back.digest() == rounded.digest()
    assert back.digest() != adapter.digest(), "nothing was rounded"
    assert over_the_wire(back, "bfloat16").digest() == back.digest()


def test_a_strided_factor_is_sent_in_the_order_of_its_rows(shapes):
    adapter = random_adapter(shapes).map(lambda tensor: tensor.T.contiguous().T)
    assert over_the_wire(adapter, "float64").digest() == adapter.digest()


def changed(adapter, key="attn.q.lora_A", **fields):
    arrays, values = encode_adapter(adapter, "float32")
    arrays[key] = replace(arrays[key], **fields)
    return arrays, values


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": b"\0" * 95}, r"'attn.q.lora_A' has 95 bytes for shape \(2, 12\).*expected 96"),
        ({"data": b"\0" * 100}, r"'attn.q.lora_A' has 100 bytes .*expected 96"),
        ({"shape": (3, 12)}, r"has 96 bytes for shape \(3, 12\) in float32, expected 144"),
        ({"dtype": "float64"}, r"has 96 bytes for shape \(2, 12\) in float64, expected 192"),
        ({"dtype": "int32"}, "is flexlora.raw/int32, expected flexlora.raw with float32"),
        ({"stype": "numpy.ndarray"}, "is numpy.ndarray/float32, expected flexlora.raw"),
        ({"shape": (24,)}, r"module 'attn.q': lora_A has shape \(24,\)"),
        ({"shape": (3, 8)}, r"module 'attn.q': lora_A has shape \(3, 8\)"),
        ({"shape": (0, 12), "data": b""}, r"module 'attn.q': lora_A has shape \(0, 12\)"),
        ({"shape": (-2, -12)}, "attn.q"),
    ],
)
def test_an_array_that_is_not_what_it_says_is_refused(adapter, fields, message):
    with pytest.raises(UpdateRefused, match=message):
        decode_adapter(*changed(adapter, **fields))


def test_missing_and_unknown_arrays_are_refused(adapter):
    arrays, values = encode_adapter(adapter, "float32")
    lacking = {key: array for key, array in arrays.items() if key != "mlp.up.lora_B"}
    with pytest.raises(UpdateRefused, match=r"differ in \['mlp.up.lora_B'\]"):
        decode_adapter(lacking, values)
    with pytest.raises(UpdateRefused, match=r"differ in \['extra.lora_A'\]"):
        decode_adapter({**arrays, "extra.lora_A": arrays["attn.q.lora_A"]}, values)


@pytest.mark.parametrize(
    "values",
    [
        {"alphas": [16.0]},
        {"rslora": []},
        {"alphas": [float("nan"), 16.0, 16.0]},
        {"alphas": [0.0, 16.0, 16.0]},
        {"alphas": [-1.0, 16.0, 16.0]},
    ],
    ids=lambda values: str(values),
)
def test_alphas_that_are_missing_or_make_no_sense_are_refused(adapter, values):
    arrays, good = encode_adapter(adapter, "float32")
    with pytest.raises(UpdateRefused, match=r"alpha is|length"):
        decode_adapter(arrays, {**good, **values})


def test_an_update_without_modules_is_refused():
    with pytest.raises(UpdateRefused):
        decode_adapter({}, {"modules": [], "alphas": [], "rslora": []})


@pytest.mark.parametrize("key", ["modules", "alphas", "rslora"])
def test_an_update_without_its_module_list_is_refused(adapter, key):
    arrays, values = encode_adapter(adapter, "float32")
    del values[key]
    with pytest.raises(UpdateRefused):
        decode_adapter(arrays, values)


@pytest.mark.parametrize(
    ("labels", "kept"), [(("lora_B",), "lora_A"), (("lora_A",), "lora_B"), (FACTORS, None)]
)
def test_only_the_named_factors_travel_and_the_rest_is_what_is_held(adapter, labels, kept):
    held = adapter.map(lambda tensor: tensor + 1.0)
    arrays, values = encode_adapter(adapter, "float32", labels)
    assert {key.rpartition(".")[2] for key in arrays} == set(labels)
    own = sum(getattr(f, label).nbytes for f in adapter.values() for label in labels)
    assert sum(len(array.data) for array in arrays.values()) == own
    back = decode_adapter(arrays, values, labels=labels, held=held)
    for name, factors in back.items():
        for label in FACTORS:
            origin = held if label == kept else adapter
            assert torch.equal(getattr(factors, label), getattr(origin[name], label))
        assert (factors.alpha, factors.rslora) == (adapter[name].alpha, True)


def test_a_factor_that_neither_travels_nor_is_held_is_refused(adapter):
    arrays, values = encode_adapter(adapter, "float32", ("lora_B",))
    with pytest.raises(UpdateRefused, match=r"'attn.q' has no lora_A, and nothing is held"):
        decode_adapter(arrays, values, labels=("lora_B",))
    others = Adapter({name: f for name, f in adapter.items() if name != "attn.q"})
    with pytest.raises(UpdateRefused, match=r"'attn.q' has no lora_A, and nothing is held"):
        decode_adapter(arrays, values, labels=("lora_B",), held=others)
    other_rank = random_adapter(
        {name: (f.out_features, f.in_features) for name, f in adapter.items()}, rank=5
    )
    with pytest.raises(UpdateRefused, match="with one rank"):
        decode_adapter(arrays, values, labels=("lora_B",), held=other_rank)


@pytest.mark.parametrize("sent", [("lora_A",), FACTORS])
def test_arrays_of_a_factor_that_was_not_to_travel_are_refused(adapter, sent):
    """Nor does the other factor do in the place of the one that is missing."""
    arrays, values = encode_adapter(adapter, "float32", sent)
    with pytest.raises(UpdateRefused, match="differ in"):
        decode_adapter(arrays, values, labels=("lora_B",), held=adapter)
