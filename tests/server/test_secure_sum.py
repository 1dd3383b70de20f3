"""The whole protocol in memory: sums are the plain ones to the bit, whoever drops out when."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from flexlora.errors import UpdateRefused
from flexlora.privacy.secure.packing import pack_bits, unpack_bits
from flexlora.server.rounds.secure_secrets import SumFailed
from flexlora.wire.secure_messages import KeysReply, UnmaskReply
from secure_round import SHAPES, SecureRound

PHASES = ("keys", "shares", "masked", "unmask")


def some(count, share, seed):
    """``share`` of the places from 1 to ``count``."""
    draws = np.random.default_rng(seed)
    return set((draws.permutation(count)[: round(share * count)] + 1).tolist())


def totals(round_):
    """The server's sums of numbers by band after unmasking, modulo the band's bits."""
    server = round_.server
    bits = {band: server.plan.grids[band].bits for band in server.opened_bands}
    return {b: server.totals[b].astype(np.int64) % 2 ** bits[b] for b in server.opened_bands}


def same(found, expected):
    return all(np.array_equal(found[band], expected[band]) for band in found)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("count", "share"), [(9, 0.0), (40, 0.03), (20, 0.3), (50, 0.3)])
def test_the_sums_are_the_plain_ones_exactly_whoever_drops_out_when(count, share, phase):
    round_ = SecureRound(count)
    missing = some(count, share, 3)
    opened = round_.run(**{phase: missing})
    counted = set(range(1, count + 1)) - (set() if phase == "unmask" else missing)
    assert set(round_.server.alive) == counted
    assert len(round_.server.opened_bands) == 3
    assert same(totals(round_), round_.plain_totals(counted))
    statistics = opened.statistics
    assert statistics.examples == sum(round_.weights[k] for k in counted)
    losses = sum(round_.weights[k] * round_.losses[k] for k in counted)
    assert statistics.loss == pytest.approx(losses, abs=len(counted) / 2**11)


def test_one_of_a_hundred_clients_drops_out_while_it_trains():
    round_ = SecureRound(100)
    round_.run(masked={17})
    assert round_.server.degrees == {0: 52, 1: 40, 2: 32}
    assert same(totals(round_), round_.plain_totals(set(range(1, 101)) - {17}))


def test_drop_outs_in_every_phase_of_one_round():
    round_ = SecureRound(60)
    gone = {phase: some(60, 0.1, k) for k, phase in enumerate(PHASES)}
    round_.run(**gone)
    counted = set(range(1, 61)) - gone["keys"] - gone["shares"] - gone["masked"]
    assert set(round_.server.alive) == counted
    assert same(totals(round_), round_.plain_totals(counted))


def test_the_sum_is_that_of_the_weighted_matrices():
    round_ = SecureRound(12)  # no norm above C = 1; with C = 5 the grid rounds by up to 6 %
    opened = round_.run(masked={4})
    for name, (out, _) in SHAPES.items():
        expected = torch.zeros(out, min(out, 7), dtype=torch.float64)
        for k in set(round_.weights) - {4}:
            matrix = round_.matrices[k][name]
            expected[:, : matrix.shape[1]] += round_.weights[k] * matrix
        error = float((opened.matrices[name] - expected).norm() / expected.norm())
        assert error < 0.05


def test_one_mask_too_many_shows():
    """Negative control: a band's sum with one mask left in it is not the plain one."""
    round_ = SecureRound(9)
    round_.keys()
    round_.shares()
    round_.masked(silent={5})
    round_.unmask()
    round_.server._remove_pairs = lambda place: None
    round_.server.opened()
    assert not same(totals(round_), round_.plain_totals(set(range(1, 10)) - {5}))


# --- what the server sees of one client --------------------------------------------------------


def evenness(numbers, bits):
    """The p-value that numbers below ``2^bits`` are uniform, by their upper and lower bits."""
    upper = np.bincount(numbers >> (bits - 6), minlength=64)
    lower = np.bincount(numbers & 63, minlength=64)
    return min(chisquare(upper).pvalue, chisquare(lower).pvalue)


def test_what_a_client_sends_is_uniform_and_without_masks_it_is_not():
    shapes = {"a": (3000, 8), "b": (1000, 8)}
    round_ = SecureRound(8, shapes=shapes, ranks=(2,))
    round_.run()
    bits = round_.server.plan.grids[0].bits
    for place in (1, 5):
        plain = round_.plain[place][0]
        sent = unpack_bits(round_.sent[place], bits, len(plain))
        assert evenness(sent, bits) > 1e-4
        assert evenness(plain, bits) < 1e-100
        assert len(round_.sent[place]) == len(pack_bits(plain, bits))


# --- bands -------------------------------------------------------------------------------------


def test_a_band_of_too_few_clients_is_left_out_of_the_sum():
    round_ = SecureRound(12, ranks=(2, 2, 2, 2, 2, 7))
    opened = round_.run()
    assert round_.server.left_out == {1: 2}
    assert list(round_.server.opened_bands) == [0]
    assert {matrix.shape[1] for matrix in opened.matrices.values()} == {2}
    sizes = {len(round_.sent[place]) for place in round_.sent}
    assert len(sizes) == 1, "nobody sends columns that are not summed"


def test_a_band_that_falls_below_the_group_while_clients_train_is_not_opened():
    round_ = SecureRound(9)
    opened = round_.run(masked={2, 5})  # two of the three of rank 7
    assert round_.server.left_out == {2: 1}
    assert list(round_.server.opened_bands) == [0, 1]
    assert same(totals(round_), round_.plain_totals({1, 3, 4, 6, 7, 8, 9}))
    for matrix in opened.matrices.values():
        assert matrix[:, :3].any() and not matrix[:, 3:].any()


def test_a_client_of_low_rank_sends_its_own_columns_only():
    round_ = SecureRound(9)
    round_.run()
    sizes = {round_.classes[k].rank: len(round_.sent[k]) for k in (1, 2, 3)}
    assert sizes[2] < sizes[3] < sizes[7]


def test_pooled_columns_are_one_band_that_all_send_and_the_sum_is_the_same():
    banded, pooled = SecureRound(9, ranks=(2, 3, 3)), SecureRound(9, ranks=(2, 3, 3), pooled=True)
    sums = [round_.run(masked={4}).matrices for round_ in (banded, pooled)]
    assert list(pooled.server.opened_bands) == [0]
    assert len({len(data) for data in pooled.sent.values()}) == 1
    for name in SHAPES:
        gap = (sums[0][name] - sums[1][name]).norm() / sums[0][name].norm()
        assert sums[0][name].shape == sums[1][name].shape and float(gap) < 0.02


# --- rounds that fail --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phase", "words"),
    [("keys", "2 clients gave keys"), ("shares", "2 clients shared"), ("masked", "2 clients sent")],
)
def test_a_round_of_fewer_than_the_group_is_none(phase, words):
    with pytest.raises(SumFailed, match=rf"{words}.*expected 3 \(privacy.min-group\)|0 clients"):
        SecureRound(9).run(**{phase: set(range(1, 8))})


def test_below_the_threshold_nothing_is_opened():
    with pytest.raises(SumFailed, match="4 of 8 shares of a client that answered, too few: 5 are"):
        SecureRound(9).run(unmask={6, 7, 8, 9})


def test_a_client_without_enough_holders_is_not_asked_to_train():
    """Five of nine share: of their eight neighbours four are left, five are needed."""
    with pytest.raises(SumFailed, match="0 clients shared their secrets"):
        SecureRound(9).run(shares={6, 7, 8, 9})


# --- replies that are wrong --------------------------------------------------------------------


def test_one_wrong_share_costs_nothing():
    round_ = SecureRound(9)

    def spoil(place, reply):
        seeds = tuple(bytes(len(text)) for text in reply.seeds) if place == 2 else reply.seeds
        return UnmaskReply(server_round=4, session=reply.session, seeds=seeds, keys=reply.keys)

    round_.keys()
    round_.shares()
    round_.masked()
    round_.unmask(spoil=spoil)
    round_.server.opened()
    assert same(totals(round_), round_.plain_totals(range(1, 10)))


def test_shares_of_another_length_are_counted_as_wrong():
    round_ = SecureRound(9)

    def spoil(place, reply):
        seeds = (b"short", *reply.seeds[1:]) if place == 2 else reply.seeds
        return UnmaskReply(server_round=4, session=reply.session, seeds=seeds, keys=reply.keys)

    round_.keys()
    round_.shares()
    round_.masked()
    round_.unmask(spoil=spoil)
    assert round_.server.wrong == {2: 1}
    round_.server.opened()


@pytest.mark.parametrize("bad", [b"", bytes(32), b"x" * 31])
def test_a_key_that_is_none_is_refused(bad):
    round_ = SecureRound(9)
    request = round_.server.keys_requests()[1]
    with pytest.raises(UpdateRefused, match="a public key of"):
        round_.server.add_keys(
            1, KeysReply(server_round=4, session=request.session, channel=b"c" * 32, mask=bad)
        )


def test_masked_numbers_are_taken_once_and_whole():
    round_ = SecureRound(9)
    round_.keys()
    round_.shares(silent={9})
    requests = round_.server.mask_requests()
    most = round_.server.most_bytes(1)
    with pytest.raises(UpdateRefused, match="bytes of masked numbers, expected"):
        round_.server.add_masked(1, bytes(most - 1))
    round_.server.add_masked(1, bytes(most))
    with pytest.raises(UpdateRefused, match="not asked for"):
        round_.server.add_masked(1, bytes(most))
    assert 9 not in requests
    with pytest.raises(UpdateRefused, match="not asked for"):
        round_.server.add_masked(9, bytes(most))


def test_a_reply_of_another_session_is_refused():
    round_ = SecureRound(9)
    reply = KeysReply(server_round=4, session=b"s" * 16, channel=b"c" * 32, mask=b"m" * 32)
    with pytest.raises(UpdateRefused, match="another round, or of another session"):
        round_.server.add_keys(1, reply)
