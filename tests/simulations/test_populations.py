"""Who the simulated clients are: exact shares, the same client every time, and what is refused."""

from collections import Counter

import numpy as np
import pytest

from flexlora.config.resolve import Config
from flexlora.data.caps import num_rows, parse_examples
from flexlora.errors import UserError
from flexlora.lora.ranks import RankClass, quotas
from flexlora.planning.devices import DEVICES, GIB
from flexlora.planning.memory_ranks import memory_rank
from flexlora.planning.model_config import read_shape
from flexlora.planning.shapes import TrainingPlan
from flexlora.simulations.world.links import LINKS, find_link, link_of
from flexlora.simulations.world.populations import Population

MIXED = "jetson-orin-nano-8gb:0.7,rtx-4090:0.2,Pixel 8 Pro:0.1"
NAMES = ("Jetson Orin Nano 8GB", "RTX 4090", "Pixel 8 Pro")
LINES = "wifi:0.5,lte:0.3,fiber:0.2"


def ids(count):
    return [f"client_{k:04}" for k in range(count)]


def population(count=40, **keys):
    values = {f"population.{key.replace('_', '-')}": value for key, value in keys.items()}
    seed = values.pop("population.seed", 0)
    clients = ids(count) if isinstance(count, int) else count
    return Population.from_config(Config.of({**values, "seed": seed}), clients)


def rows_held(examples, client_id, available, seed=0):
    return num_rows(parse_examples(examples), client_id, available, seed=seed)


@pytest.mark.parametrize("count", [1, 3, 10, 40, 97, 1613])
def test_shares_are_met_exactly(count):
    dealt = population(count, devices=MIXED, links=LINES)
    devices = Counter(dealt.client(i).device.name for i in ids(count))
    assert [devices[name] for name in NAMES] == quotas((0.7, 0.2, 0.1), count)
    links = Counter(dealt.client(i).link.kind for i in ids(count))
    assert [links[kind] for kind in ("wifi", "lte", "fiber")] == quotas((0.5, 0.3, 0.2), count)


def test_a_client_is_the_same_in_any_order_of_clients_and_another_under_another_seed():
    keys = {"devices": MIXED, "links": LINES}
    one, other = population(**keys), population(ids(40)[::-1], **keys)
    assert {i: one.client(i) for i in ids(40)} == {i: other.client(i) for i in ids(40)}
    seeded = population(**keys, seed=1)
    assert {i: one.client(i).device for i in ids(40)} != {
        i: seeded.client(i).device for i in ids(40)
    }
    dealt = [[rows_held("lognormal:60:1", i, 500, seed) for i in ids(40)] for seed in (0, 0, 1)]
    assert dealt[0] == dealt[1] != dealt[2]


def test_what_is_not_dealt_by_share_does_not_depend_on_the_other_clients():
    few, many = (
        population(count, devices="a10:1", links="lte:1", dropout=0.5) for count in (5, 50)
    )
    for client_id in ids(5):
        assert few.client(client_id) == many.client(client_id)
        for server_round in range(1, 6):
            leaves = few.leaves_at(client_id, server_round)
            assert leaves == many.leaves_at(client_id, server_round)


def test_devices_and_links_are_dealt_independently():
    """With one permutation for both, every link would go to a block of one kind of device."""
    dealt = population(400, devices="a10:0.5,t4:0.5", links="wifi:0.5,lte:0.5")
    both = Counter((c.device.name, c.link.kind) for c in dealt.clients.values())
    assert len(both) == 4 and all(60 <= count <= 140 for count in both.values())


def test_speeds_are_lognormal_around_the_median_of_the_link():
    median = LINKS["lte"]
    drawn = [link_of(i, median, sigma=0.5, seed=3) for i in ids(4000)]
    logs = np.log([link.down_mbps / median.down_mbps for link in drawn])
    assert abs(logs.mean()) < 4 * 0.5 / np.sqrt(4000) and logs.std() == pytest.approx(0.5, rel=0.05)
    latency = np.log([link.latency_seconds / median.latency_seconds for link in drawn])
    assert latency.std() == pytest.approx(0.5, rel=0.05)
    assert abs(np.corrcoef(logs, latency)[0, 1]) < 0.07
    ratio = median.up_mbps / median.down_mbps
    assert all(link.up_mbps / link.down_mbps == pytest.approx(ratio) for link in drawn)
    assert link_of("a", median, sigma=0.0, seed=3) == median


def test_a_transfer_takes_the_latency_once_and_its_bits_at_the_speed():
    link = find_link("LTE ")
    assert link.download_seconds(21.3e6 / 8) == pytest.approx(1.054)
    assert link.upload_seconds(6.3e6 / 8) == pytest.approx(1.054)
    assert link.download_seconds(0) == 0.0


@pytest.mark.parametrize("link", LINKS.values(), ids=lambda link: link.kind)
def test_every_link_is_possible_and_says_who_measured_it(link):
    assert link.source and link.up_mbps <= link.down_mbps
    assert 1 <= link.down_mbps <= 10_000 and 0.0005 <= link.latency_seconds <= 0.8
    assert (link.watts > 0) == (link.kind in ("wifi", "5g", "lte", "3g"))


def test_rows_are_capped_and_nobody_who_has_some_is_left_without():
    assert [rows_held("100", "client_0001", n) for n in (0, 1, 99, 100, 5000)] == [
        0,
        1,
        99,
        100,
        100,
    ]
    assert rows_held("", "client_0001", 5000) == 5000
    rows = [rows_held("lognormal:1:3", i, 10) for i in ids(200)]
    assert min(rows) == 1 and max(rows) == 10
    assert rows_held("lognormal:1:3", "client_0001", 0) == 0


def test_row_counts_are_lognormal():
    logs = np.log([rows_held("lognormal:60:1.0", i, 10**9) for i in ids(3000)])
    assert logs.mean() == pytest.approx(np.log(60), abs=4 / np.sqrt(3000))
    assert logs.std() == pytest.approx(1.0, rel=0.05)


def test_so_many_leave_and_so_many_are_slow_and_the_two_are_independent():
    dealt = population(300, dropout=0.3, straggler_share=0.2, straggler_slowdown=4.0)
    draws = [(i, r) for i in ids(300) for r in range(1, 11)]
    leaves = np.array([dealt.leaves_at(*draw) is not None for draw in draws])
    slow = np.array([dealt.slowdown(*draw) for draw in draws])
    assert set(slow) == {1.0, 4.0}
    assert leaves.mean() == pytest.approx(0.3, abs=4 * np.sqrt(0.3 * 0.7 / 3000))
    assert (slow == 4.0).mean() == pytest.approx(0.2, abs=4 * np.sqrt(0.2 * 0.8 / 3000))
    assert (leaves & (slow == 4.0)).mean() == pytest.approx(0.06, abs=4 * np.sqrt(0.06 / 3000))
    parts = np.array([p for draw in draws if (p := dealt.leaves_at(*draw)) is not None])
    assert parts.min() >= 0 and parts.max() < 1 and parts.mean() == pytest.approx(0.5, abs=0.04)


def test_the_same_client_leaves_in_some_rounds_and_not_in_others():
    dealt = population(dropout=0.5)
    fates = {dealt.leaves_at("client_0007", r) is None for r in range(1, 30)}
    assert fates == {True, False}
    assert all(population().leaves_at("client_0007", r) is None for r in range(1, 30))
    assert all(population(dropout=1.0).leaves_at(i, 1) is not None for i in ids(40))
    assert all(population().slowdown(i, 1) == 1.0 for i in ids(40))


def test_without_devices_there_is_no_hardware_and_the_rest_still_holds():
    bare = population(dropout=1.0, availability="markov", online_share=0.4)
    client = bare.client("client_0003")
    assert not bare.has_hardware and population(devices=MIXED).has_hardware
    assert client.device is None and client.link is None and client.free_bytes is None
    assert bare.leaves_at("client_0003", 1) is not None
    assert 5 < sum(bare.availability.online(i, 0.0) for i in ids(40)) < 35


def test_what_a_simulated_device_reports_is_what_the_rank_policy_goes_by():
    """A shared memory counts received factors too; a card's label must not begin with cpu."""
    jetson = population(1, devices="jetson orin nano 8gb:1").client("client_0000")
    card = population(1, devices="rtx-3070:1").client("client_0000")
    assert jetson.device_label == "cpu (Jetson Orin Nano 8GB)" and card.device_label == "RTX 3070"
    assert jetson.free_bytes == 6 * GIB - jetson.device.runtime_bytes
    assert card.free_bytes == 8 * GIB - card.device.runtime_bytes
    shape, plan = read_shape("embedded"), TrainingPlan(rank=1, max_length=128, batch=8)
    for client in (jetson, card):
        given = memory_rank(
            shape,
            plan,
            free_bytes=client.free_bytes,
            num_examples=200,
            quantization="none",
            device=client.device_label,
        )
        assert given == RankClass.of(16)  # ten of 200 rows to each direction; memory is no limit


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"devices": "a10:0.5"}, r"population.devices is 'a10:0.5' and adds up to 0.5"),
        ({"devices": "a10:0.7,t4:0.7"}, "adds up to 1.4, expected shares that make 1"),
        ({"devices": "a10:1.5,t4:-0.5"}, "the share of a10 is '1.5', expected a number from 0 to"),
        ({"devices": "a10:nan"}, "the share of a10 is 'nan'"),
        ({"devices": "a10:much"}, "the share of a10 is 'much'"),
        ({"devices": "a10"}, "'a10' has no share"),
        ({"devices": "a10:1,"}, "'' has no share"),
        ({"devices": "a10:0.5,A 10:0.5"}, "names A10 twice"),
        ({"devices": "rtx-4091:1"}, r"device 'rtx-4091' is not known.*Did you mean .*'RTX 4090'"),
        ({"devices": "orin:1"}, "Did you mean 'Jetson Orin Nano 4GB' or"),
        ({"devices": "a10:1", "links": "wify:1"}, "population.links is 'wify:1'.*mean 'wifi'"),
        ({"devices": "a10:1", "links": "wifi:0.9"}, "population.links .* adds up to 0.9"),
        ({"links": "wifi:1"}, "population.links is 'wifi:1' and population.devices is not set"),
        ({"clock_model": "x"}, "population.clock-model is 'x' and population.devices is not set"),
        ({"link_sigma": 1.0}, "population.link-sigma is 1.0 and population.links is not set"),
        ({"straggler_slowdown": 9.0}, "population.straggler-share is not set: it slows stragglers"),
        (
            {"online_share": 0.5},
            "population.online-share is 0.5, which population.availability=alw",
        ),
    ],
)
def test_populations_that_make_no_sense_are_refused(keys, message):
    with pytest.raises(UserError, match=message):
        population(**keys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0", "population.examples is '0', expected a number of rows of at least 1"),
        ("12.5", "population.examples is '12.5'"),
        ("lognormal:60", "population.examples is 'lognormal:60'"),
        ("lognormal:0:1", "population.examples is 'lognormal:0:1'"),
        ("lognormal:60:-1", "population.examples is 'lognormal:60:-1'"),
        ("lognormal:60:nan", "population.examples is 'lognormal:60:nan'"),
        ("normal:60:1", "population.examples is 'normal:60:1'"),
    ],
)
def test_numbers_of_rows_that_make_no_sense_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse_examples(text)


def test_an_unknown_client_is_told_the_nearest():
    with pytest.raises(UserError, match=r"'client_9' is not in the population\. Did you mean"):
        population().client("client_9")
    with pytest.raises(UserError, match=r"link 'wire' is not known, expected one of datacenter, "):
        find_link("wire")


def test_row_laws_as_numbers():
    assert parse_examples("") is None and parse_examples(" 100 ") == (100.0, 0.0)
    assert parse_examples("lognormal:60:1.5") == (60.0, 1.5)


@pytest.mark.parametrize("name", DEVICES)
def test_every_device_can_be_asked_for_as_it_is_written(name):
    assert population(2, devices=f"{name}:1.0").client("client_0000").device == DEVICES[name]
