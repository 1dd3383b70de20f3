"""What a run gives to serve, and how a run in progress is followed."""

import pytest
import torch

from federation import small
from flexlora.errors import UserError
from flexlora.lora.peft_folder import load_adapter
from flexlora.runs.folder import RunFolder
from flexlora.serving.adapter_store import AdapterStore
from flexlora.simulations.served_adapters import FollowedRun, add_run, read_run
from flexlora.simulations.simulate import simulate
from flexlora.training.models import load_base
from flexlora.training.personal_store import PersonalStore


@pytest.fixture(scope="module")
def config():
    return small(num_server_rounds=2, personal__rank=2, personal__max_steps=1)


@pytest.fixture(scope="module")
def rounds(config, tmp_path_factory):
    """Folders of the same run after one round and after two."""
    first, second = (tmp_path_factory.mktemp("runs") / name for name in ("one", "two"))
    simulate(config.with_values({"num-server-rounds": 1}), first)
    simulate(config, second)
    return first, second


@pytest.fixture
def store():
    return AdapterStore(load_base("embedded", device="cpu", fresh=True))


def test_a_run_gives_its_classes_the_global_one_and_its_clients(rounds, store):
    _, path = rounds
    found = add_run(store, path, prefix="run/")
    clients = [name for name in found.adapters if name.startswith("client/")]
    assert len(clients) == 4
    assert store.names() == sorted(f"run/{name}" for name in found.adapters)
    for name in ("rank_2", "rank_4", "global"):
        written = load_adapter(path / "adapters" / name)
        for module, factors in written.items():
            torch.testing.assert_close(
                found.adapters[name].delta_weight(module), factors.delta_weight()
            )
    with pytest.raises(UserError, match="two adapters are named 'run/"):
        add_run(store, path, prefix="run/")


def test_a_client_has_its_own_factors_over_those_of_its_class(rounds):
    _, path = rounds
    found, personal = read_run(path), PersonalStore(path / "personal")
    _, classes = RunFolder(path).load_checkpoint()
    apart = 0.0
    for client, rank_class in classes.items():
        stored = personal.before(client, 3)
        for name, factors in found.adapters[f"client/{client}"].items():
            shared = found.adapters[rank_class.name][name].delta_weight()
            both = shared + stored.adapter[name].delta_weight()
            torch.testing.assert_close(factors.delta_weight(), both)
            apart = max(apart, float((both - shared).abs().max()))
    assert apart > 1e-6, "the control: personal training has changed something"


def test_a_run_on_another_base_is_refused(rounds, store):
    object.__setattr__(store.base, "fingerprint", "0" * 32)
    for add in (add_run, lambda store, path: FollowedRun(store, path).poll()):
        with pytest.raises(UserError, match=r"cannot be served: the base 'embedded' has changed"):
            add(store, rounds[0])
    assert store.names() == []


def test_a_followed_run_is_served_from_each_round_on(rounds, store, tmp_path):
    first, second = rounds
    place = tmp_path / "run"
    place.symlink_to(first)
    followed = FollowedRun(store, place)
    assert followed.poll() == 1
    before = {name: store.newest(name) for name in store.names()}
    assert followed.poll() is None, "nothing has changed"
    assert {name: store.newest(name) for name in store.names()} == before
    place.unlink()
    place.symlink_to(second)
    assert followed.poll() == 2
    assert store.names() == sorted(before)
    after = store.newest("rank_4").adapter
    assert any(
        not torch.equal(f.delta_weight(), before["rank_4"].adapter[n].delta_weight())
        for n, f in after.items()
    )


def test_a_run_without_a_round_or_half_written_is_waited_for(rounds, store, tmp_path, config):
    followed = FollowedRun(store, RunFolder.create(tmp_path / "new", config).path)
    assert followed.poll() is None
    with pytest.raises(UserError, match="is not a run folder"):
        FollowedRun(store, tmp_path / "none").poll()
