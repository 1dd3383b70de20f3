"""Every scenario file is a configuration that can run: keys, clients, ranks and clock."""

from collections import Counter

import pytest

from flexlora.config.resolve import KEYS, Config
from flexlora.data.caps import num_rows, parse_examples
from flexlora.lora.ranks import quotas
from flexlora.planning.model_config import read_shape
from flexlora.planning.rank_policies import PAPER_SHARES, paper_types
from flexlora.server.settings import check_config, rank_policy_of
from flexlora.simulations.world.clock import Clock, Effort
from flexlora.simulations.world.populations import Population
from paths import ROOT

FOLDER = ROOT / "simulations" / "scenarios"
SCENARIOS = sorted(FOLDER.glob("*.toml"))
PAPER = [file for file in SCENARIOS if file.stem.startswith("paper-")]


def ids(config):
    count = config.clients.count or 1613
    return [f"client_{k:04}" for k in range(count)]


def resolved(name):
    return Config.resolve(file=FOLDER / f"{name}.toml")


def test_all_that_were_promised_are_there():
    names = {file.stem for file in SCENARIOS}
    assert names >= {"smoke", "edge-mixed", "cross-silo-8", "flexlora-1613"}
    assert {file.stem for file in PAPER} == {name.replace(":", "-") for name in PAPER_SHARES}


@pytest.mark.parametrize("file", SCENARIOS, ids=lambda file: file.stem)
def test_a_scenario_resolves_to_settings_a_population_and_its_clock(file):
    config = Config.resolve(file=file)
    given = Config.given(file=file)
    assert given and all(config.flat()[key] == value for key, value in given.items())
    clients = ids(config)
    check_config(config)
    population = Population.from_config(config, clients)
    assert sorted(population.clients) == clients
    clock = Clock.from_config(config, population)
    assert (clock is None) == (config.population.devices == "")
    assert file.read_text("utf-8").startswith("# ")  # what it is, for the person who opens it


@pytest.mark.parametrize("file", SCENARIOS, ids=lambda file: file.stem)
def test_a_scenario_says_nothing_about_this_machine(file):
    given = Config.given(file=file)
    ours = ("model.name", "data.path", "data.name", "population.trace", "ranks.file", "out")
    assert not set(given) & set(ours)
    assert not any(key.startswith(("engine.", "server.")) for key in given)
    assert "/" not in file.stem and file.stem == file.stem.lower()


@pytest.mark.parametrize("file", PAPER, ids=lambda file: file.stem)
def test_the_papers_populations_are_the_papers(file):
    config = Config.resolve(file=file)
    policy = config.ranks.policy
    assert file.stem == policy.replace(":", "-") and config.method.name == "flexlora"
    table = rank_policy_of(config).assign(ids(config))
    counts = Counter(table.values())
    types = paper_types(config.ranks.scale)
    assert [counts[kind] for kind in types] == quotas(PAPER_SHARES[policy], len(table))
    assert len(set(types)) == 4 and [kind.rank for kind in types] == [1, 4, 4, 25]
    assert (config.lora.alpha, config.train.per_device_train_batch_size) == (16.0, 4)
    sides = [min(x.out_features, x.in_features) for x in read_shape("embedded").linears]
    assert types[-1].rank <= min(sides)  # no rank is cut, so the four types stay four


def test_the_1613_clients_are_trained_as_in_the_paper():
    config = resolved("flexlora-1613")
    assert config.ranks.policy == "paper:heavy-tail-light" and config.clients.count == 0
    assert round(config.fraction_train * 1613) == 81
    assert config.train.max_steps == 0 and config.train.num_train_epochs == 1
    assert config.train.max_length == 512
    law = parse_examples(config.population.examples)
    rows = [num_rows(law, i, 200, seed=config.seed) for i in ids(config)]
    assert set(rows) == {16}  # four steps of four rows an epoch, whatever the data folder holds


def test_eight_institutions_train_in_every_round():
    config = resolved("cross-silo-8")
    population = Population.from_config(config, ids(config))
    assert config.fraction_train == 1.0 and len(population.clients) == 8
    devices = {client.device for client in population.clients.values()}
    assert all(device.kind == "cuda" and device.memory_gib >= 40 for device in devices)
    assert config.population.dropout == 0.0 and config.population.availability == "always"


def test_the_edge_has_phones_and_workstations_that_come_and_go():
    config = resolved("edge-mixed")
    population = Population.from_config(config, ids(config))
    kinds = {client.device.kind for client in population.clients.values()}
    assert kinds == {"cpu", "cuda"}
    assert config.population.dropout > 0 and config.population.straggler_share > 0
    online = [population.availability.online(i, 3600.0) for i in ids(config)]
    assert 0 < sum(online) < len(online)
    clock = Clock.from_config(config, population)
    table = rank_policy_of(config).assign(ids(config))
    work = {"quantization": "none", "tokens": 4000, "steps": 10}
    prices = {
        i: clock.price(
            Effort(
                client_id=i,
                server_round=1,
                rank_class=table[i],
                bytes_down=10**5,
                bytes_up=10**5,
                **work,
            )
        )
        for i in ids(config)
    }
    # A phone takes minutes for what a workstation does in seconds, and nobody takes a day.
    seconds = sorted(paid.seconds for paid in prices.values())
    assert seconds[0] < 10 < 60 < seconds[-1] < 24 * 3600
    assert len({paid.seconds for paid in prices.values()}) == len(prices)


def test_a_scenario_opens_no_connection(monkeypatch):
    def refused(*arguments, **_):
        raise AssertionError(f"asked the hub for {arguments}")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refused)
    for file in SCENARIOS:
        config = Config.resolve(file=file)
        Clock.from_config(config, Population.from_config(config, ids(config)))
    assert KEYS["population.clock-model"].default == ""
