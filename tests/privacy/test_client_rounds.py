"""What a client spends by taking part: the theorems, by formulas and by dp-accounting itself."""

import math

import pytest
from dp_accounting import get_epsilon_gaussian
from dp_accounting.pld import privacy_loss_distribution as pld
from scipy.stats import norm

from flexlora.config.resolve import Config
from flexlora.privacy.client_rounds import ClientLedgers, client_epsilon, client_round
from flexlora.privacy.ledger import Ledger
from spelled import of_names

LOCAL = {
    "method.name": "basis",
    "privacy.mode": "local",
    "privacy.clip": 0.5,
    "privacy.noise-multiplier": 4.0,
    "privacy.delta": 1e-5,
}
EXAMPLE = {**LOCAL, "privacy.mode": "example", "train.per-device-train-batch-size": 4}


def config(base, **changes):
    return Config.of({**base, **of_names(**changes)})


def delta_of(epsilon, mean):
    """Of two Gaussians of variance 1 whose means are ``mean`` apart (Balle and Wang, theorem 8)."""
    first = norm.cdf(mean / 2 - epsilon / mean)
    return first - math.exp(epsilon) * norm.cdf(-mean / 2 - epsilon / mean)


@pytest.mark.parametrize("rounds", [1, 7])
@pytest.mark.parametrize("noise", [1.0, 4.0, 20.0])
def test_local_epsilon_is_that_of_changes_that_are_2c_apart(noise, rounds):
    """Two clipped changes may point in opposite directions; a sensitivity of C would be wrong."""
    mechanism, count = client_round(config(LOCAL, privacy__noise_multiplier=noise), 33)
    epsilon = client_epsilon([(mechanism, rounds * count)], 1e-5)
    apart = 2 / noise * math.sqrt(rounds)  # of the composed means, in deviations
    assert delta_of(epsilon, apart) == pytest.approx(1e-5, rel=1e-3)
    assert epsilon == pytest.approx(get_epsilon_gaussian(1 / apart, 1e-5), rel=1e-9)
    assert epsilon > 1.5 * get_epsilon_gaussian(2 / apart, 1e-5)  # of C: another promise


@pytest.mark.parametrize(("rows", "steps"), [(40, 5), (200, 30)])
def test_example_epsilon_is_dp_accountings_for_every_step(rows, steps):
    chosen = config(EXAMPLE, train__max_steps=steps, privacy__noise_multiplier=1.0)
    mechanism, count = client_round(chosen, rows)
    assert count == steps
    epsilon = client_epsilon([(mechanism, 3 * count)], 1e-5)
    one = pld.from_gaussian_mechanism(1.0, sampling_prob=4 / rows)
    direct = one.self_compose(3 * steps).get_epsilon_for_delta(1e-5)
    assert direct <= epsilon * (1 + 1e-9) and epsilon == pytest.approx(direct, rel=2e-2, abs=2e-3)


def test_a_client_with_fewer_rows_than_a_batch_is_not_amplified():
    mechanism, count = client_round(config(EXAMPLE, train__max_steps=6), 3)
    assert (mechanism.sampling, mechanism.noise_multiplier, count) == ("none", 4.0, 6)
    epsilon = client_epsilon([(mechanism, count)], 1e-5)
    assert epsilon == pytest.approx(get_epsilon_gaussian(4 / math.sqrt(6), 1e-5), rel=1e-9)


def test_epochs_and_accumulated_passes_are_steps_and_shares():
    chosen = config(
        EXAMPLE,
        train__max_steps=0,
        train__num_train_epochs=2,
        train__gradient_accumulation_steps=3,
    )
    mechanism, count = client_round(chosen, 50)
    assert (mechanism.sample_share, count) == (12 / 50, 2 * 5)


def test_each_client_has_spent_its_own_rounds():
    ledgers = ClientLedgers(config(LOCAL))
    for client_id in ("a", "a", "b"):
        ledgers.spend(client_id, 9)
    spent = ledgers.epsilons()
    once = client_epsilon([client_round(config(LOCAL), 9)], 1e-5)
    assert set(spent) == {"a", "b"}
    assert spent["b"] == pytest.approx(once) and spent["b"] < spent["a"] < 2 * once
    again = ClientLedgers(config(LOCAL))
    again.restore(ledgers.to_dict())
    assert again.epsilons() == spent
    assert ClientLedgers(Config()).epsilons() == {}


def test_a_client_refuses_the_round_that_would_exceed_its_budget():
    once = client_epsilon([client_round(config(LOCAL), 9)], 1e-5)
    ledgers = ClientLedgers(config(LOCAL, privacy__epsilon=1.2 * once))
    assert not ledgers.refusal("a", 9)
    ledgers.spend("a", 9)
    assert "of this client epsilon" in ledgers.refusal("a", 9)
    assert "one more round would make it" in ledgers.refusal("a", 9)
    assert not ledgers.refusal("b", 9)
    assert not ClientLedgers(config(LOCAL)).refusal("a", 9)


def test_a_round_of_many_steps_counts_as_many():
    chosen = config(EXAMPLE, train__max_steps=30)
    mechanism, count = client_round(chosen, 200)
    twice = Ledger(delta=1e-5).after(mechanism, count).after(mechanism, count)
    assert twice.rounds == ((mechanism, 60),)
