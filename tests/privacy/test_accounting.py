"""Epsilon against dp-accounting called directly, and the figures that a wrong accountant misses."""

from __future__ import annotations

import dp_accounting as dp
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from flexlora.errors import UserError
from flexlora.privacy.accounting import Mechanism, epsilon_of, noise_for
from flexlora.privacy.ledger import Ledger

REPLACE_ONE = dp.NeighboringRelation.REPLACE_ONE
DELTA = 1e-5


def mechanism(noise=1.0, *, clients=1613, share=80 / 1613, **keys):
    return Mechanism(num_clients=clients, sample_share=share, noise_multiplier=noise, **keys)


def composed(accountant, event, rounds):
    return accountant.compose(event, rounds).get_epsilon(DELTA)


@pytest.mark.parametrize(
    ("keys", "epsilon"),
    [
        ({}, 2.65),
        ({"cap": 120}, 2.66),
        ({"cap": 100}, 5.72),
        ({"cap": 80}, 11.30),
        ({"sampling": "fixed"}, 22.02),
        ({"sampling": "none"}, 54.38),
    ],
)
def test_1613_clients_80_a_round_50_rounds(keys, epsilon):
    """Noise multiplier 1, delta 1e-5: what the way of sampling makes of it."""
    assert epsilon_of([(mechanism(**keys), 50)], DELTA) == pytest.approx(epsilon, abs=0.006)


def test_the_multiplier_unchanged_under_fixed_size_is_the_wrong_figure():
    """dp-accounting's Renyi accountant does not apply the factor 2 of replacing a client."""
    event = dp.SampledWithoutReplacementDpEvent(1613, 80, dp.GaussianDpEvent(1.0))
    wrong = composed(RdpAccountant(neighboring_relation=REPLACE_ONE), event, 50)
    assert wrong == pytest.approx(4.74, abs=0.005)
    right = epsilon_of([(mechanism(sampling="fixed"), 50)], DELTA)
    assert right == pytest.approx(22.02, abs=0.005) and right > 4 * wrong
    twice = epsilon_of([(mechanism(2.0, sampling="fixed"), 50)], DELTA)
    assert twice == pytest.approx(wrong)


def test_loss_distributions_are_tighter_than_renyi_divergences():
    event = dp.PoissonSampledDpEvent(80 / 1613, dp.GaussianDpEvent(1.0))
    assert composed(RdpAccountant(), event, 50) == pytest.approx(3.16, abs=0.005)


@pytest.mark.parametrize("noise", [1.5, 2.5])
@pytest.mark.parametrize("share", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("rounds", [1, 20])
def test_poisson_is_the_library_called_directly(noise, share, rounds):
    event = dp.PoissonSampledDpEvent(share, dp.GaussianDpEvent(noise))
    ours = epsilon_of([(mechanism(noise, share=share), rounds)], DELTA)
    assert ours == pytest.approx(composed(PLDAccountant(), event, rounds), rel=1e-9)


@pytest.mark.parametrize(("clients", "cap", "noise"), [(100, 12, 4.0), (1000, 150, 8.0)])
def test_truncated_poisson_is_the_library_called_directly(clients, cap, noise):
    event = dp.TruncatedSubsampledGaussianDpEvent(clients, 0.1, cap, noise)
    ours = epsilon_of([(mechanism(noise, clients=clients, share=0.1, cap=cap), 10)], DELTA)
    assert ours == pytest.approx(composed(PLDAccountant(), event, 10), rel=1e-9)


@pytest.mark.parametrize(("size", "noise"), [(5, 1.0), (50, 3.0), (100, 8.0)])
def test_fixed_size_is_the_library_at_half_the_multiplier(size, noise):
    event = dp.SampledWithoutReplacementDpEvent(100, size, dp.GaussianDpEvent(noise / 2))
    direct = composed(RdpAccountant(neighboring_relation=REPLACE_ONE), event, 30)
    once = mechanism(noise, clients=100, share=size / 100, sampling="fixed")
    assert epsilon_of([(once, 30)], DELTA) == pytest.approx(direct, rel=1e-9)


@pytest.mark.parametrize(("noise", "rounds"), [(4.0, 50), (5.0, 7)])
def test_no_amplification_is_the_library_called_directly(noise, rounds):
    direct = composed(PLDAccountant(), dp.GaussianDpEvent(noise), rounds)
    ours = epsilon_of([(mechanism(noise, sampling="none"), rounds)], DELTA)
    assert ours == pytest.approx(direct, rel=1e-6)


def test_rounds_of_unequal_mechanisms_compose():
    """Noise, share and way of sampling may change between rounds."""
    first, second = mechanism(2.0), mechanism(3.0, share=0.1)
    third = mechanism(9.0, sampling="none")
    direct = PLDAccountant()
    for noise, share, rounds in ((2.0, 80 / 1613, 3), (3.0, 0.1, 2)):
        direct.compose(dp.PoissonSampledDpEvent(share, dp.GaussianDpEvent(noise)), rounds)
    direct.compose(dp.GaussianDpEvent(9.0), 4)
    ours = epsilon_of([(first, 3), (second, 2), (third, 4)], DELTA)
    assert ours == pytest.approx(direct.get_epsilon(DELTA), rel=1e-6)


def test_rounds_add_up_in_any_order_and_none_costs_nothing():
    one, other = mechanism(2.0), mechanism(3.0)
    there = epsilon_of([(one, 2), (other, 3)], DELTA)
    assert epsilon_of([(other, 3), (one, 2)], DELTA) == pytest.approx(there, rel=1e-6)
    assert epsilon_of([(one, 1), (one, 1)], DELTA) == pytest.approx(
        epsilon_of([(one, 2)], DELTA), rel=1e-6
    )
    assert epsilon_of([], DELTA) == epsilon_of([(one, 0)], DELTA) == 0.0


def test_little_noise_costs_no_more_memory():
    """At 1e-4 the losses of these rounds would be 10^8 numbers."""
    epsilon = epsilon_of([(mechanism(0.05, share=1.0), 20)], DELTA)
    assert epsilon == pytest.approx(dp.get_epsilon_gaussian(0.05 / 20**0.5, DELTA), rel=1e-3)


@pytest.mark.parametrize(
    ("budget", "keys"),
    [(0.3, {}), (2.0, {}), (8.0, {"sampling": "none"})],
)
def test_the_noise_of_a_budget_keeps_it_and_little_less_does_not(budget, keys):
    noise = noise_for(budget, DELTA, 20, num_clients=1613, sample_share=80 / 1613, **keys)
    assert epsilon_of([(mechanism(noise, **keys), 20)], DELTA) <= budget
    assert epsilon_of([(mechanism(noise * 0.995, **keys), 20)], DELTA) > budget


def test_the_noise_of_a_budget_under_a_cap():
    keys = {"num_clients": 100, "sample_share": 0.1, "cap": 15}
    noise = noise_for(1.0, DELTA, 10, **keys)
    epsilon = epsilon_of([(Mechanism(noise_multiplier=noise, **keys), 10)], DELTA)
    assert 0.99 < epsilon <= 1.0


def test_a_ledger_counts_rounds_and_survives_json():
    ledger = Ledger(delta=DELTA)
    assert ledger.epsilon == 0.0
    for noise in (2.0, 2.0, 3.0):
        ledger = ledger.after(mechanism(noise))
    assert ledger.rounds == ((mechanism(2.0), 2), (mechanism(3.0), 1)) and ledger.num_rounds == 3
    again = Ledger.from_dict(ledger.to_dict())
    assert (
        again == ledger and 0 < again.epsilon == ledger.epsilon < again.after(mechanism()).epsilon
    )


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"clients": 0}, "0 clients, expected at least 1"),
        ({"share": 0.0}, "share is 0, expected more than 0"),
        ({"share": 80.0}, "share is 80, expected more than 0 and at most 1"),
        ({"noise": 0.0}, "multiplier is 0, expected at least 0.01"),
        ({"noise": float("nan")}, "multiplier is nan, expected at least 0.01"),
        ({"cap": 2000}, "cap is 2000 under poisson sampling of 1613 clients"),
        ({"cap": 9, "sampling": "fixed"}, "cap is 9 under fixed sampling"),
    ],
)
def test_a_mechanism_refuses(keys, sentence):
    with pytest.raises(UserError, match=sentence):
        mechanism(**keys)


def test_what_cannot_be_accounted_is_refused():
    with pytest.raises(UserError, match="delta is 0, expected"):
        epsilon_of([(mechanism(), 1)], 0.0)
    mixed = [(mechanism(), 1), (mechanism(sampling="fixed"), 1)]
    with pytest.raises(UserError, match="rounds of fixed size and others cannot be added up"):
        epsilon_of(mixed, DELTA)
    keys = {"num_clients": 10, "sample_share": 1.0}
    with pytest.raises(UserError, match="budget epsilon is 0, expected more than 0"):
        noise_for(0.0, DELTA, 5, **keys)
    with pytest.raises(UserError, match=r"multiplier from 0\.01 to 100000 has an epsilon of 1e-09"):
        noise_for(1e-9, 1e-15, 1000, **keys)
