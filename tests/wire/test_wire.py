"""Adapters on the wire: exact where the dtype allows it, and nothing odd gets past the decoder."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference_wire
from builders import random_adapter
from flexlora.errors import UpdateRefused
from flexlora.lora.adapters import Adapter, LoRAFactors
from flexlora.wire.encoding import (
    FACTORS,
    decode_adapter,
    encode_adapter,
    encoded_bytes,
    over_the_wire,
)


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
        ({"dtype": "int32"}, "is 'int32', expected one of float32, bfloat16"),
        ({"stype": "numpy.ndarray"}, "serialized as 'numpy.ndarray', expected flexlora.raw"),
        ({"shape": (24,)}, r"'attn.q.lora_A' has shape \(24,\), expected two dimensions"),
        ({"shape": (3, 8)}, r"module 'attn.q': lora_A has shape \(3, 8\)"),
        ({"shape": (0, 12), "data": b""}, r"has shape \(0, 12\), expected two .* from 1 up"),
        ({"shape": (-2, -12)}, r"has shape \(-2, -12\), expected two dimensions from 1 up"),
        ({"shape": (2**62, 4, 0), "data": b""}, "expected two dimensions from 1 up"),
        ({"shape": (2**62, 0), "data": b""}, "expected two dimensions from 1 up"),
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


# --- int8 -----------------------------------------------------------------------------------


def spread(adapter):
    """Directions of very unequal size, as singular values make them."""

    def falling(factors):
        sizes = 0.1 ** torch.arange(factors.rank, dtype=factors.lora_B.dtype)
        return replace(factors, lora_B=factors.lora_B * sizes)

    return Adapter({name: falling(factors) for name, factors in adapter.items()})


def test_int8_decodes_to_the_reference(adapter):
    back = over_the_wire(spread(adapter), "int8")
    for name, factors in spread(adapter).items():
        for label in FACTORS:
            expected = torch.from_numpy(reference_wire.decoded(getattr(factors, label), label))
            assert torch.equal(getattr(back[name], label).double(), expected)


def test_int8_takes_a_byte_a_number_and_a_scale_a_direction(adapter):
    arrays, _ = encode_adapter(adapter, "int8")
    numbers = sum(f.lora_A.numel() + f.lora_B.numel() for f in adapter.values())
    scales = sum(2 * f.rank for f in adapter.values())
    assert sum(len(array.data) for array in arrays.values()) == numbers + 4 * scales


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "int8"])
@pytest.mark.parametrize("labels", [FACTORS, ("lora_A",), ("lora_B",)])
def test_the_bytes_are_known_beforehand(adapter, dtype, labels):
    arrays, _ = encode_adapter(adapter, dtype, labels)
    sent = sum(len(array.data) for array in arrays.values())
    assert sent == encoded_bytes(adapter, dtype, labels)


def columns(tensor, label):
    """Every direction of a factor as a row."""
    return tensor if label == "lora_A" else tensor.T


def test_int8_rounds_every_number_by_at_most_half_a_step_of_its_direction(adapter):
    back = over_the_wire(spread(adapter), "int8")
    for name, factors in spread(adapter).items():
        for label in FACTORS:
            x, y = (columns(getattr(f, label), label).double() for f in (factors, back[name]))
            steps = x.abs().amax(dim=1, keepdim=True) / 127
            assert bool(((x - y).abs() <= 0.5001 * steps).all())
            assert not torch.equal(x, y), "nothing was rounded"


def test_a_scale_for_each_row_of_lora_b_would_lose_the_weak_directions():
    """Why the scales of ``lora_B`` are those of its columns: they cost less and round less."""
    adapter = spread(random_adapter({"m": (64, 48)}, rank=4, dtype=torch.float32))
    factors, back = adapter["m"], over_the_wire(adapter, "int8")["m"]
    by_row = torch.from_numpy(reference_wire.decoded(factors.lora_B.T, "lora_B").T)
    weakest = factors.lora_B[:, 3].double()
    assert float((back.lora_B[:, 3].double() - weakest).norm() / weakest.norm()) < 0.01
    assert float((by_row[:, 3] - weakest).norm() / weakest.norm()) > 0.3


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(FLOATS, min_size=6, max_size=6), st.lists(FLOATS, min_size=4, max_size=4))
@settings(max_examples=200, deadline=None)
def test_what_has_travelled_once_as_int8_travels_again_unchanged(first, second):
    """Any floats at all: rows of zeros, numbers below float32's normal ones, its largest ones."""
    factors = LoRAFactors(
        lora_A=torch.tensor(first).reshape(2, 3), lora_B=torch.tensor(second).reshape(2, 2), alpha=1
    )
    once = over_the_wire(Adapter({"m": factors}), "int8")
    for label in FACTORS:
        back = getattr(once["m"], label)
        expected = reference_wire.decoded(getattr(factors, label), label)
        assert torch.equal(back.double(), torch.from_numpy(expected))
        assert bool(torch.isfinite(back).all())
    assert over_the_wire(once, "int8").digest() == once.digest()


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("held", [False, True])
def test_a_training_that_diverged_is_not_rounded_to_numbers(adapter, odd, held):
    start = adapter.map(torch.clone)
    broken = adapter.map(torch.clone)
    broken["mlp.up"].lora_B[3, 1] = odd
    with pytest.raises(UpdateRefused, match=r"'mlp.up.lora_B' has a scale of nan.*diverge"):
        over_the_wire(broken, "int8", held=start if held else None)


def test_a_change_of_what_is_held_is_rounded_by_a_share_of_the_change(adapter):
    """And no change at all is none, to the bit."""
    held = over_the_wire(adapter, "bfloat16")
    trained = held.map(lambda tensor: tensor + 1e-3 * tensor.flip(0))
    for name, factors in over_the_wire(trained, "int8", held=held).items():
        for label in FACTORS:
            x, y, z = (getattr(f, label).double() for f in (trained[name], factors, held[name]))
            assert float((x - y).norm()) < 0.02 * float((x - z).norm())
            expected = reference_wire.decoded_with(
                getattr(trained[name], label), label, getattr(held[name], label)
            )
            assert torch.equal(y, torch.from_numpy(expected))
    whole = over_the_wire(trained, "int8")
    gap = sum(float((whole[n].lora_A - trained[n].lora_A).norm()) for n in trained)
    moved = sum(float((held[n].lora_A - trained[n].lora_A).norm()) for n in trained)
    assert gap > moved, "without what is held more is lost than was learned"
    assert over_the_wire(held, "int8", held=held).digest() == held.digest()


def test_what_is_larger_than_itself_as_a_change_travels_whole(adapter):
    far = adapter.map(lambda tensor: -tensor)
    assert (
        over_the_wire(adapter, "int8", held=far).digest() == over_the_wire(adapter, "int8").digest()
    )


def test_factors_of_another_rank_than_what_is_held_travel_whole(adapter):
    """Fewer terms than were sent (pruned)."""
    fewer = Adapter({name: factors.terms([0]) for name, factors in adapter.items()})
    assert (
        over_the_wire(fewer, "int8", held=adapter).digest() == over_the_wire(fewer, "int8").digest()
    )


def test_a_change_of_what_is_not_held_is_refused(adapter):
    arrays, values = encode_adapter(adapter, "int8", held=adapter)
    with pytest.raises(UpdateRefused, match=r"change of shape \(2, 12\), and nothing is held"):
        decode_adapter(arrays, values)
    other = Adapter({name: factors.terms([0]) for name, factors in adapter.items()})
    with pytest.raises(UpdateRefused, match=r"change of shape .*, and shape \(1, 12\) is held"):
        decode_adapter(arrays, values, held=other)


def floats(*numbers):
    return torch.tensor(numbers).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": b"\0" * 31}, r"has 31 bytes for shape \(2, 12\) in int8.rows, expected 32"),
        ({"data": b"\0" * 33}, "has 33 bytes .* expected 32"),
        ({"shape": (3, 12)}, "has 32 bytes .* expected 48"),
        ({"dtype": "int8.columns"}, "has 32 bytes .* in int8.columns, expected 72"),
        ({"dtype": "int8"}, r"is 'int8', expected one of .*int8.rows"),
        ({"dtype": "int8.rows.change"}, r"is a change of shape \(2, 12\), and nothing is held"),
        ({"data": floats(1.0, float("nan")) + b"\1" * 24}, "a scale of nan, expected finite"),
        ({"data": floats(float("inf"), 1.0) + b"\1" * 24}, "a scale of inf, expected finite"),
        ({"data": floats(-1.0, 1.0) + b"\1" * 24}, "a scale of -1.0, expected finite"),
        ({"data": floats(3e38, 1.0) + b"\1" * 24}, "a scale of 3"),
        ({"data": floats(1.0, 1.0) + b"\x80" * 24}, "a code below -127"),
        ({"shape": (24,), "data": b"\0" * 28}, r"shape \(24,\), expected two dimensions"),
        ({"shape": (0, 12), "data": b""}, r"has shape \(0, 12\), expected two .* from 1 up"),
    ],
)
def test_an_int8_array_that_is_not_what_it_says_is_refused(adapter, fields, message):
    arrays, values = encode_adapter(adapter, "int8")
    arrays["attn.q.lora_A"] = replace(arrays["attn.q.lora_A"], **fields)
    with pytest.raises(UpdateRefused, match=message):
        decode_adapter(arrays, values)
