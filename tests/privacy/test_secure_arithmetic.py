"""Packing, rotation, quantization, secret sharing, masks, graphs and bands of a secure sum."""

import math

import numpy as np
import pytest
import torch

import reference
from flexlora.lora.ranks import RankClass
from flexlora.privacy.secure import graph, masks, shamir
from flexlora.privacy.secure.bands import bands_of
from flexlora.privacy.secure.packing import pack_bits, packed_bytes, unpack_bits
from flexlora.privacy.secure.quantization import MOST_BITS, Digits, Grid, shrunk, within
from flexlora.privacy.secure.rotation import BLOCK, Rotation
from secure_round import SHAPES

# --- packing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(8, 24))
def test_numbers_are_unpacked_as_they_were_packed(bits):
    for count in (1, 7, 8, 1003):
        numbers = np.random.default_rng(bits).integers(0, 2**bits, count).astype(np.uint32)
        data = pack_bits(numbers, bits)
        assert len(data) == packed_bytes(count, bits) < count * bits / 8 + bits
        assert np.array_equal(unpack_bits(data, bits, count), numbers)


def test_packing_drops_what_is_above_the_bits():
    numbers = np.array([2**18 + 5, 2**32 - 1], dtype=np.uint32)
    assert unpack_bits(pack_bits(numbers, 18), 18, 2).tolist() == [5, 2**18 - 1]


def test_packed_bytes_of_another_length_are_refused():
    with pytest.raises(ValueError, match="17 bytes, expected 18 for 8 numbers of 18 bits"):
        unpack_bits(bytes(17), 18, 8)
    with pytest.raises(ValueError, match="7 bits, expected 8 to 23"):
        packed_bytes(8, 7)


# --- rotation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dimension", [1, 2, 3, 5, 8, 100, BLOCK - 1, BLOCK, 2 * BLOCK + 5])
def test_a_rotation_keeps_norms_and_is_undone(dimension):
    rotation, vector = Rotation(3, dimension), torch.randn(dimension).double()
    rotated = rotation.forward(vector)
    assert float(rotated.norm()) == pytest.approx(float(vector.norm()), rel=1e-12)
    assert float((rotation.inverse(rotated) - vector).abs().max()) < 1e-12


def test_blocks_are_those_of_the_dense_walsh_hadamard_matrix():
    """Of 11 numbers two blocks of 8, the second of which overlaps the first."""
    rotation, matrix = Rotation(5, 11), reference.walsh_hadamard(8)
    vector = torch.randn(11, dtype=torch.float64)
    expected = (vector * rotation._signs)[rotation._places.long()]
    expected[:8] = matrix @ expected[:8]
    expected[3:] = matrix @ expected[3:]
    assert float((rotation.forward(vector) - expected).abs().max()) < 1e-14


def test_a_rotation_spreads_columns_of_unequal_size():
    """One module in ten thousand times as large: before 8 in 100 entries are out of range."""
    vector = torch.randn(5 * BLOCK, dtype=torch.float64)
    vector[::13] *= 1e4
    limit = 5.5 * float(vector.norm()) / math.sqrt(len(vector))
    assert int((vector.abs() > limit).sum()) > 10
    assert int((Rotation(1, len(vector)).forward(vector).abs() > limit).sum()) == 0


# --- quantization ------------------------------------------------------------------------------


@pytest.mark.parametrize("clients", [3, 8, 100, 128, 129, 1613])
def test_the_largest_sum_does_not_wrap_and_the_bits_are_those_of_the_wire(clients):
    grid = Grid(dimension=10, clients=clients, clip=1.0)
    assert clients * 2 * grid.half < 2**grid.bits <= 2**MOST_BITS
    largest = grid.numbers(grid.towards_zero(np.full(10, 99.0)))
    assert set(largest.tolist()) == {2 * grid.half}
    total = (clients * largest).astype(np.uint32)
    assert grid.sum_of(total, clients) == pytest.approx(clients * 5.5 / math.sqrt(10))


def test_more_clients_than_levels_are_refused():
    with pytest.raises(ValueError, match="expected at most 32,767"):
        Grid(dimension=10, clients=40_000, clip=1.0)


def test_rounding_is_right_in_the_mean_far_below_one_step():
    grid = Grid(dimension=1000, clients=100, clip=1.0)
    draws = np.random.default_rng(0)
    for share in (0.01, 0.3, -0.3, 1.7):
        steps = grid.rounded(np.full(200_000, share * grid.unit), draws)
        assert steps.mean() == pytest.approx(share, abs=5 * 0.5 / math.sqrt(200_000))
    assert not grid.towards_zero(np.full(9, 0.3 * grid.unit)).any()  # what the nearest would do


def test_zeros_stay_zeros():
    grid = Grid(dimension=50, clients=7, clip=1.0)
    steps = grid.rounded(np.zeros(50), np.random.default_rng(0))
    assert not steps.any() and not grid.sum_of(7 * grid.numbers(steps), 7).any()


@pytest.mark.parametrize("clients", [3, 100, 1613, 20_000])
def test_what_is_sent_never_exceeds_the_clip_and_hardly_falls_below_it(clients):
    grids = [Grid(dimension=d, clients=clients, clip=2.0) for d in (900, 30)]
    bound, draws = shrunk(grids, 2.0), np.random.default_rng(1)
    for _ in range(40):
        whole = draws.normal(size=930)
        whole *= bound / np.linalg.norm(whole)
        parts = [whole[:900], whole[900:]]
        steps = within(grids, parts, draws, 2.0)
        norm = math.sqrt(
            sum(
                g.unit**2 * float((s.astype(float) ** 2).sum())
                for g, s in zip(grids, steps, strict=True)
            )
        )
        assert norm <= 2.0
        if clients <= 1613:
            assert norm > 1.9  # of 930 numbers only; the larger the dimension, the nearer


def test_rounding_that_would_exceed_the_clip_goes_towards_zero():
    """Negative control: without ``within`` the norm is above it."""
    grids = [Grid(dimension=400, clients=20_000, clip=1.0)]
    part = np.full(400, 1.0 / 20.0)
    loose = grids[0].rounded(part, np.random.default_rng(0))
    assert grids[0].unit * np.linalg.norm(loose) > 1.0
    (steps,) = within(grids, [part], np.random.default_rng(0), 1.0)
    assert grids[0].unit * np.linalg.norm(steps) <= 1.0


def test_digits_add_up_to_the_sum_of_the_values():
    grid = Grid(dimension=10, clients=100, clip=1.0)
    digits = Digits.of(grid, 10**7)
    values = np.random.default_rng(0).integers(0, 10**7 + 1, 100).tolist()
    total = sum(digits.numbers(value) for value in values)
    assert int(total.max()) < 2**grid.bits and digits.sum_of(total) == sum(values)
    with pytest.raises(ValueError, match="expected 0 to 10000000"):
        digits.numbers(10**7 + 1)


# --- secrets and masks -------------------------------------------------------------------------


def test_any_threshold_of_shares_gives_the_secret_and_fewer_do_not():
    secret, places = bytes(range(32)), [1, 2, 5, 9, 40]
    shares = shamir.split(secret, 3, places, b"k" * 32)
    for chosen in ((1, 2, 5), (40, 9, 2), (5, 1, 40)):
        assert shamir.combine({place: shares[place] for place in chosen}) == secret
    assert shamir.combine({place: shares[place] for place in (1, 9)}) != secret
    numbers = {p: int.from_bytes(s, "little") for p, s in shares.items()}
    assert reference.polynomial_at_zero(numbers, shamir.P) == int.from_bytes(secret, "little")
    assert pow(3, shamir.P - 1, shamir.P) == 1  # Fermat: no composite that is not built for it


def test_two_shares_of_three_are_any_numbers_of_any_secret():
    """With one more share made up, two shares fit every secret."""
    shares = shamir.split(b"\x01" * 32, 3, [1, 2, 3], b"k" * 32)
    found = {
        shamir.combine({1: shares[1], 2: shares[2], 3: k.to_bytes(33, "little")}) for k in range(50)
    }
    assert len(found) == 50


@pytest.mark.parametrize("wrong", [[], [1], [3], [2, 3]])
def test_wrong_shares_do_not_matter_while_enough_right_ones_are_left(wrong):
    secret, places = b"s" * 32, [1, 2, 3, 4, 5, 6]
    shares = shamir.split(secret, 4, places, b"k" * 32)
    shares |= {place: bytes(33) for place in wrong}
    assert shamir.verified(shares, 4, lambda found: found == secret) == secret
    fewer = {place: shares[place] for place in (1, 2, 3, 4)}
    if wrong:
        assert shamir.verified(fewer, 4, lambda found: found == secret) is None
    assert shamir.verified({1: shares[1]}, 4, lambda found: True) is None


def test_both_sides_agree_on_a_key_and_purposes_differ():
    first, second = b"\x01" * 32, b"\x02" * 32
    (ours,) = masks.shared_keys(first, [masks.public_of(second)])
    (theirs,) = masks.shared_keys(second, [masks.public_of(first)])
    assert ours == theirs != masks.shared_keys(b"\x03" * 32, [masks.public_of(second)])[0]
    keys = [masks.derived(ours, *p) for p in (("pair", 1), ("pair", 2), ("pair", "1"), ("pair1",))]
    assert len(set(keys)) == 4
    with pytest.raises(ValueError):
        masks.shared_keys(first, [bytes(32)])  # the point that agrees with everybody


def test_a_box_opens_for_its_key_and_its_words_only():
    key, other = b"k" * 32, b"o" * 32
    box = masks.sealed(key, 3, b"share", b"about")
    assert len(box) == len(b"share") + masks.TAG_BYTES
    assert masks.opened(key, 3, box, b"about") == b"share"
    for wrong in (
        masks.opened(other, 3, box, b"about"),
        masks.opened(key, 4, box, b"about"),
        masks.opened(key, 3, box, b"other"),
        masks.opened(key, 3, box[:-1] + b"\x00", b"about"),
    ):
        assert wrong is None


def test_a_mask_that_is_added_and_subtracted_leaves_nothing():
    numbers = np.arange(600_001, dtype=np.uint32)
    masked = numbers.copy()
    masks.add_mask(masked, b"k" * 32)
    stream = np.frombuffer(masks.keystream(b"k" * 32, 4 * len(numbers)), "<u4")
    assert np.array_equal(masked, numbers + stream)  # also across the parts
    masks.add_mask(masked, b"k" * 32, -1)
    assert np.array_equal(masked, numbers)


# --- graphs and bands --------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 20, 33, 40, 100, 301])
def test_neighbours_are_mutual_and_as_many_for_all(count):
    members = list(range(5, 5 + count))
    found = graph.neighbours(members, seed=1)
    degree = graph.degree(count)
    assert list(map(len, found.values())) == [degree] * count
    for member, others in found.items():
        assert member not in others and all(member in found[other] for other in others)
        assert degree // 2 < graph.threshold(degree) <= degree
    if count > 33:
        assert found != graph.neighbours(members, seed=2)


@pytest.mark.parametrize("count", [100, 1000])
def test_with_thirty_percent_silent_a_majority_of_neighbours_answers(count):
    """In all of 100 rounds; with half of the degree it fails in some."""
    degree = graph.degree(count)
    assert degree < count / 1.5
    fails = {degree: 0, degree // 2: 0}
    for k in range(100):
        draws = np.random.default_rng(k)
        circle = draws.permutation(count) >= 0.3 * count  # who answers, in circle order
        for neighbours in fails:
            steps = range(1, neighbours // 2 + 1)
            sides = [np.roll(circle, sign * step) for step in steps for sign in (1, -1)]
            least = int(np.sum(sides, axis=0).min())
            fails[neighbours] += least < graph.threshold(neighbours)
    assert fails[degree] == 0 and fails[degree // 2] > 0


def test_bands_hold_every_column_once_for_those_who_have_it():
    classes = [RankClass.of(2), RankClass.of(3), RankClass.of(16)]
    classes.append(RankClass(name="mixed", rank=3, pattern=(("attn", 9),)))
    ranks = {c.name: c.ranks(SHAPES) for c in classes}
    bands = bands_of(ranks)
    assert bands[0].classes == set(ranks)
    assert {first for first, _ in bands[0].columns.values()} == {0}
    for name, own in ranks.items():
        for module, rank in own.items():
            own_bands = [band for band in bands if name in band.classes]
            columns = [band.columns[module] for band in own_bands if module in band.columns]
            covered = sorted(c for first, last in columns for c in range(first, last))
            assert covered == list(range(rank))


def test_a_band_is_written_back_where_it_was_read():
    rows = {name: out for name, (out, _) in SHAPES.items()}
    ranks = {c.name: c.ranks(SHAPES) for c in (RankClass.of(2), RankClass.of(5))}
    whole = {name: torch.randn(out, 5) for name, out in rows.items()}
    copy = {name: torch.zeros_like(matrix) for name, matrix in whole.items()}
    for band in bands_of(ranks):
        vector = band.vector(whole)
        assert len(vector) == band.dimension(rows)
        band.put(vector, copy)
    assert all(torch.equal(copy[name], whole[name]) for name in whole)
