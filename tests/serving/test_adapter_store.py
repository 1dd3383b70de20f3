"""Adapters by name: what is refused, what is on the device, what a replacement changes."""

import json
import threading

import pytest
import torch

from builders import random_adapter
from flexlora.errors import UserError
from flexlora.lora.adapters import Adapter
from flexlora.lora.peft_folder import save_adapter
from flexlora.runs.sources import write_origin
from flexlora.serving.adapter_store import AdapterStore
from flexlora.training.models import load_base
from served import answer, asked, drained, engine_of, prompts, strong_adapter


@pytest.fixture(scope="module")
def base():
    return load_base("embedded", device="cpu", fresh=True)


@pytest.fixture
def store(base):
    return AdapterStore(base)


@pytest.fixture
def shapes(store):
    return store.targets.shapes


def folder_of(tmp_path, adapter, base, fingerprint=None):
    folder = tmp_path / "adapter"
    save_adapter(adapter, folder, base="x")
    write_origin(folder, fingerprint or base.fingerprint)
    return folder


def test_names_come_and_go(store, shapes):
    store.add("b", strong_adapter(shapes, 2, 1))
    store.add("a", strong_adapter(shapes, 3, 1))
    assert store.names() == ["a", "b"]
    store.remove("b")
    assert store.names() == ["a"]
    with pytest.raises(UserError, match=r"no adapter is named 'aa'\. Did you mean 'a'\?"):
        store.remove("aa")
    with pytest.raises(UserError, match="two adapters are named 'a'"):
        store.add("a", strong_adapter(shapes, 2, 1))
    for name in ("", "x" * 201, "a\nb"):
        with pytest.raises(UserError, match="expected 1 to 200 characters"):
            store.add(name, strong_adapter(shapes, 2, 1))


def test_a_folder_is_read_with_its_padding_left_out(store, shapes, base, tmp_path):
    adapter = strong_adapter(shapes, 5, 1)
    first = next(iter(adapter))
    adapter = Adapter({**adapter, first: strong_adapter({first: shapes[first]}, 9, 2)[first]})
    store.add("mine", folder_of(tmp_path, adapter, base))
    version = store.newest("mine")
    assert version.rank == 9
    assert sorted(f.rank for f in version.adapter.values()) == [5] * (len(adapter) - 1) + [9]


def test_another_base_is_refused_by_its_fingerprint(store, shapes, base, tmp_path):
    folder = folder_of(tmp_path, strong_adapter(shapes, 2, 1), base, "0" * 32)
    with pytest.raises(UserError, match=r"adapter 'x' .* trained on another base than 'embedded'"):
        store.add("x", folder)
    assert store.names() == []


def test_a_pickle_is_never_opened(store, shapes, base, tmp_path):
    folder = folder_of(tmp_path, strong_adapter(shapes, 2, 1), base)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="pickle, which is never opened"):
        store.add("x", folder)


def test_ranks_that_the_config_does_not_name_are_refused(store, shapes, base, tmp_path):
    folder = folder_of(tmp_path, strong_adapter(shapes, 4, 1), base)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "r": 8}))
    with pytest.raises(UserError, match=r"lora_A has rank 4, adapter_config\.json says 8"):
        store.add("x", folder)


def test_modules_that_do_not_fit_are_refused(store, shapes):
    name, (out, width) = next(iter(shapes.items()))
    with pytest.raises(UserError, match=r"does not fit 'embedded': the base has no linear"):
        store.add("x", random_adapter({f"{name}x": (out, width)}, 2, dtype=torch.float32))
    with pytest.raises(UserError, match=r"is \(\d+, \d+\) in the base, the adapter's is"):
        store.add("x", random_adapter({name: (out, width + 1)}, 2, dtype=torch.float32))
    with pytest.raises(UserError, match=r"'lm_head' cannot be served, as it is the output layer"):
        store.add("x", random_adapter({"lm_head": (529, 128)}, 2, dtype=torch.float32))
    wild = random_adapter({name: (out, width)}, 2, dtype=torch.float32).map(
        lambda t: t.sign() * 1e38
    )
    with pytest.raises(UserError, match="not finite once it is scaled"):
        store.add("x", wild)


def test_an_adapter_larger_than_the_device_memory_for_adapters_is_refused(base, shapes):
    store = AdapterStore(base, device_bytes=8 * AdapterStore(base).row_bytes)
    store.add("eight", strong_adapter(shapes, 8, 1))
    with pytest.raises(UserError, match="of rank 9 takes 1 MiB, and"):
        store.add("nine", strong_adapter(shapes, 9, 1))


def test_the_least_recently_used_that_nobody_uses_makes_room(base, shapes):
    store = AdapterStore(base, device_bytes=10 * AdapterStore(base).row_bytes)
    versions = {}
    for k, rank in enumerate((4, 4, 2, 5)):
        store.add(str(k), strong_adapter(shapes, rank, k))
        versions[k] = store.newest(str(k))
    for k in (0, 1, 2):
        assert store.load(versions[k])
    store.release(versions[0])
    store.release(versions[1])
    assert store.load(versions[0])
    assert not store.load(versions[3]), "0 and 2 are pinned: 4 of 10 rows could be free"
    assert (store.resident, store.evictions) == (3, 0), "nothing is evicted in vain"
    store.release(versions[2])
    assert store.load(versions[3])
    assert versions[1] not in store.arena, "used before 2"
    assert (store.resident_bytes, store.loads) == (9 * store.row_bytes, 4)
    assert store.evictions == 2


def test_names_change_while_requests_run(base, shapes):
    """Adding, replacing and removing from another thread, with answers that stay right."""
    adapters = {str(k): strong_adapter(shapes, 2 + 3 * k, k) for k in range(4)}
    (prompt,) = prompts(1, seed=5)
    with engine_of(base, adapters) as engine:
        expected = {k: answer(engine, prompt, k, max_tokens=6).tokens for k in adapters}
        stop = threading.Event()

        def change():
            while not stop.is_set():
                for name, adapter in adapters.items():
                    engine.adapters.add(name, adapter, replace=True)
                engine.adapters.add("more", adapters["0"])
                engine.adapters.remove("more")

        thread = threading.Thread(target=change)
        thread.start()
        try:
            for wave in range(4):
                readers = {
                    name: asked(engine, f"{wave} {name}", prompt, name, max_tokens=6)
                    for name in adapters
                }
                drained(engine)
                assert {name: r.tokens for name, r in readers.items()} == expected
        finally:
            stop.set()
            thread.join()
