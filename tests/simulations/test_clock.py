"""What a training takes out there: its parts, who leaves and when, and another model's price."""

import pytest

from flexlora.config.resolve import Config
from flexlora.errors import UserError
from flexlora.lora.ranks import RankClass
from flexlora.planning.model_config import read_shape
from flexlora.planning.shapes import TrainingPlan
from flexlora.simulations.world.clock import Clock, Effort, OwnTraining, Price
from flexlora.simulations.world.clock_models import CLOCK_MODELS, clock_shape
from flexlora.simulations.world.links import LINKS
from flexlora.simulations.world.populations import Population
from flexlora.simulations.world.step_costs import LAYER_SECONDS, adapter_numbers
from paths import CONFIGS

QWEN = "Qwen/Qwen2.5-0.5B"
WORK = {
    "quantization": "none",
    "tokens": 20_000,
    "steps": 20,
    "bytes_down": 10**6,
    "bytes_up": 10**5,
}


def effort(client_id, server_round, **work):
    return Effort(client_id=client_id, server_round=server_round, **work)


def clock(**keys):
    values = {"population.devices": "rtx-4090:1", **keys}
    config = Config.of(values)
    made = Clock.from_config(config, Population.from_config(config, ["a"]))
    assert made is not None
    return made


def price(made, rank=8, **changes):
    return made.price(effort("a", 1, **{"rank_class": RankClass.of(rank), **WORK, **changes}))


def test_a_price_is_its_parts():
    line = LINKS["lte"]
    made = clock(**{"population.links": "lte:1", "population.link-sigma": 0.0})
    paid = price(made)
    assert paid.download_seconds == pytest.approx(line.download_seconds(10**6))
    assert paid.upload_seconds == pytest.approx(line.upload_seconds(10**5))
    assert paid.seconds == paid.download_seconds + paid.train_seconds + paid.upload_seconds
    transfers = paid.download_seconds + paid.upload_seconds
    assert paid.joules_until(paid.seconds) == pytest.approx(
        450 * paid.train_seconds + 2.5 * transfers
    )
    assert paid.leaves_after is None


def test_without_links_transfers_take_no_time_and_no_power():
    paid = price(clock())
    assert paid.download_seconds == paid.upload_seconds == 0.0
    assert (
        paid.joules_until(paid.seconds) == pytest.approx(450 * paid.train_seconds)
        and paid.train_seconds > 0
    )


def test_energy_until_a_client_leaves():
    paid = Price(
        download_seconds=2.0, train_seconds=10.0, upload_seconds=4.0, train_watts=5, radio_watts=1
    )
    spent = [paid.joules_until(t) for t in (-1, 0, 1, 2, 7, 12, 14, 16, 99)]
    assert spent == [0, 0, 1, 2, 27, 52, 54, 56, 56] and paid.joules_until(paid.seconds) == 56


def test_bytes_come_after_the_latency_and_then_evenly():
    paid = Price(download_seconds=3.0, train_seconds=10.0, upload_seconds=4.0, latency_seconds=1.0)
    times = (0, 0.5, 1, 1.5, 2, 3, 99)
    assert [paid.downloaded_until(t) for t in times] == [0, 0, 0, 0.25, 0.5, 1, 1]
    link = LINKS["lte"]
    paid = price(clock(**{"population.links": "lte:1", "population.link-sigma": 0.0}))
    until = link.latency_seconds + 8 * 250_000 / (1e6 * link.down_mbps)
    assert paid.downloaded_until(until) == pytest.approx(0.25)
    assert price(clock()).downloaded_until(0.0) == 1.0, "without links it is there at once"


def test_stragglers_train_longer_and_transfer_as_before():
    links = {"population.links": "lte:1"}
    slow = {**links, "population.straggler-share": 1.0, "population.straggler-slowdown": 4.0}
    usual, straggling = price(clock(**links)), price(clock(**slow))
    assert straggling.train_seconds == pytest.approx(4 * usual.train_seconds)
    assert straggling.download_seconds == usual.download_seconds
    assert straggling.joules_until(straggling.seconds) > usual.joules_until(usual.seconds)


def test_a_client_that_drops_out_leaves_within_its_job_and_always_then():
    made = clock(**{"population.dropout": 0.5, "population.links": "wifi:1"})
    again = clock(**{"population.dropout": 0.5, "population.links": "wifi:1"})
    fates = []
    for server_round in range(1, 200):
        paid = made.price(effort("a", server_round, rank_class=RankClass.of(8), **WORK))
        assert paid == again.price(effort("a", server_round, rank_class=RankClass.of(8), **WORK))
        assert paid.leaves_after is None or 0 <= paid.leaves_after < paid.seconds
        fates.append(paid.leaves_after is None)
    assert 0.35 < sum(fates) / len(fates) < 0.65


@pytest.mark.parametrize(
    ("cheaper", "dearer"),
    [
        ({"population.devices": "h100-sxm:1"}, {"population.devices": "rtx-4090:1"}),
        ({"population.devices": "rtx-4090:1"}, {"population.devices": "jetson-orin-nano-8gb:1"}),
        ({"population.devices": "jetson-orin-nano-8gb:1"}, {"population.devices": "pixel-8:1"}),
        ({}, {"train.gradient-checkpointing": True}),
        ({"method.name": "flexlora"}, {"method.name": "carried"}),
        ({"lora.target-modules": "q_proj"}, {}),
        ({"population.clock-model": QWEN}, {"population.clock-model": "Qwen/Qwen2.5-7B"}),
    ],
)
def test_more_work_and_less_machine_take_longer(cheaper, dearer):
    base = {"population.clock-model": QWEN}
    few, many = (price(clock(**{**base, **keys}), tokens=10**6) for keys in (cheaper, dearer))
    assert few.train_seconds < many.train_seconds


@pytest.mark.parametrize(
    "changes", [{"tokens": 10**7}, {"rank": 64}, {"quantization": "nf4"}, {"quantization": "8bit"}]
)
def test_more_tokens_ranks_and_dequantization_take_longer(changes):
    made = clock(**{"population.clock-model": QWEN})
    usual = price(made, tokens=10**6).train_seconds
    assert price(made, **{"tokens": 10**6, **changes}).train_seconds > 1.003 * usual


def test_short_rows_on_a_fast_card_take_the_time_of_starting_kernels():
    made = clock(**{"population.clock-model": QWEN})
    floor = 20 * 2 * 24 * LAYER_SECONDS
    assert price(made).train_seconds == pytest.approx(floor)
    assert price(made, rank=64).train_seconds == pytest.approx(floor)


@pytest.mark.parametrize(("looks", "own"), [(0, 0), (5, 0), (0, 30), (5, 30)])
def test_every_pass_has_its_time(looks, own):
    """Batches looked at and own steps are passes as any: on a fast card each takes as long."""
    made = clock(**{"population.clock-model": QWEN})
    extra = OwnTraining(rank=4, tokens=50 * own, steps=own) if own else None
    paid = price(made, looks=looks, own=extra)
    assert paid.train_seconds == pytest.approx((20 + looks + own) * 2 * 24 * LAYER_SECONDS)


def test_own_factors_are_trained_over_all_that_the_client_was_sent():
    """A second training at the same rank costs more than the first: the first one's lie frozen."""
    made = clock(**{"population.clock-model": QWEN})
    tokens = 10**6
    own = OwnTraining(rank=64, tokens=tokens, steps=20)
    first = price(made, rank=64, tokens=tokens).train_seconds
    both = price(made, rank=64, tokens=tokens, own=own).train_seconds
    assert 2.01 * first < both < 2.5 * first
    slow = {"population.straggler-share": 1.0, "population.straggler-slowdown": 4.0}
    late = price(clock(**{"population.clock-model": QWEN, **slow}), 64, tokens=tokens, own=own)
    assert late.train_seconds == pytest.approx(4 * both)


def test_a_card_without_bfloat16_units_computes_in_float32():
    shape = str(CONFIGS / "llama-2-7b.json")
    old, new = (
        clock(**{"population.devices": f"{name}:1", "population.clock-model": shape})
        for name in ("v100-32gb", "a100-40gb")
    )
    ratio = price(old, tokens=10**6).train_seconds / price(new, tokens=10**6).train_seconds
    assert ratio == pytest.approx(312.0 / 15.7, rel=0.05)


@pytest.mark.parametrize("method", ["flexlora", "carried"])
def test_a_clock_model_costs_what_training_it_would(method):
    """The tiny base trains; the price is the one of a run whose model.name is the other model."""
    counted = {"method.name": method, "population.links": "lte:1"}
    counted |= {"method.carried-rank": 200} if method == "carried" else {}  # the tiny base cuts it
    tiny = clock(**{**counted, "population.clock-model": QWEN})
    whole = clock(
        **{
            **counted,
            "model.name": str(CONFIGS / "qwen2.5-0.5b.json"),
            "model.dtype": "bfloat16",
        }
    )
    down, up = (200 if method == "carried" else 0), RankClass.of(8)

    def sent(made):
        trained = adapter_numbers(made.trained_shape, up, "all-linear")
        held = adapter_numbers(made.trained_shape, RankClass.of(down), "all-linear") if down else 0
        return {"bytes_down": 4 * (trained + held), "bytes_up": 4 * trained}

    ours, theirs = price(tiny, **sent(tiny)), price(whole, **sent(whole))
    assert ours.download_seconds == pytest.approx(theirs.download_seconds)
    assert ours.upload_seconds == pytest.approx(theirs.upload_seconds)
    assert ours.train_seconds == pytest.approx(theirs.train_seconds)
    assert price(clock(**counted), **sent(tiny)).seconds < ours.seconds  # the tiny base's own


def test_the_table_of_models_is_their_config_json():
    files = ("qwen2.5-0.5b", "qwen2.5-7b", "llama-2-7b", "llama-3-8b", "mistral-7b")
    for name, file in zip(CLOCK_MODELS, files, strict=True):
        assert clock_shape(name) == read_shape(str(CONFIGS / f"{file}.json"))


def test_no_devices_no_clock():
    config = Config.of({"population.dropout": 0.5})
    population = Population.from_config(config, ["a"])
    assert Clock.from_config(config, population) is None
    bare = Clock(
        population=population,
        shape=read_shape("embedded"),
        trained_shape=read_shape("embedded"),
        plan=TrainingPlan(rank=1, max_length=9),
    )
    with pytest.raises(UserError, match="client 'a' has no simulated device to price"):
        price(bare)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"population.clock-model": "./none"}, r"population.clock-model is './none': the model is"),
        ({"model.name": "./none"}, r"population.devices needs the sizes of model.name .*'./none'"),
        ({"lora.target-modules": "c_attn"}, "needs the sizes .*target modules are 'c_attn'"),
    ],
)
def test_a_clock_that_cannot_count_is_refused(keys, message):
    with pytest.raises(UserError, match=message):
        clock(**keys)


def test_an_unknown_client_has_no_price():
    with pytest.raises(UserError, match="client 'b' is not in the population"):
        clock().price(effort("b", 1, rank_class=RankClass.of(8), **WORK))
