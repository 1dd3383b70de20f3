"""Adapters loaded and dropped over HTTP: only where allowed, only from below one folder."""

import pytest

from flexlora.lora.peft_folder import save_adapter
from flexlora.serving.adapter_store import AdapterStore
from flexlora.training.models import load_base
from flexlora.training.targets import find_targets
from http_service import NoAdapters, ObedientEngine, client_of, error_of, front_of
from served import strong_adapter

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture(scope="module")
def base():
    return load_base("embedded", device="cpu")


@pytest.fixture
def place(base, tmp_path):
    """A folder to load from with two adapters, beside one that is outside."""
    shapes = find_targets(base.model, "all-linear")
    for seed, name in enumerate(("in/one", "in/two", "outside")):
        save_adapter(strong_adapter(shapes, 2, seed), tmp_path / name, base="embedded")
    return tmp_path / "in"


@pytest.fixture
def served(base, place):
    """A client of a server with one adapter, which may load from ``place``, and the store."""
    store = AdapterStore(base)
    store.add("given", place / "one")
    with (
        front_of(ObedientEngine(), store, base.tokenizer, loading=place) as front,
        client_of(front) as client,
    ):
        yield client, store


def load(client, name, path, **more):
    return client.post(LOAD, json={"lora_name": name, "lora_path": str(path), **more})


def test_an_adapter_is_loaded_replaced_and_dropped(served, place):
    client, store = served
    answer = load(client, "new", place / "two")
    assert answer.text == "Success: LoRA adapter 'new' added successfully."
    assert "new" in [model["id"] for model in client.get("/v1/models").json()["data"]]
    before = store.newest("new")
    error = error_of(load(client, "new", "one"), 400)
    assert "named 'new' already; load_inplace: true replaces it" in error["message"]
    assert load(client, "new", "one", load_inplace=True).status_code == 200
    assert store.newest("new") is not before
    assert client.post(UNLOAD, json={"lora_name": "new"}).status_code == 200
    assert store.names() == ["given"]
    assert error_of(client.post(UNLOAD, json={"lora_name": "new"}), 404)["param"] == "lora_name"


def test_what_was_given_at_the_start_stays(served):
    client, store = served
    error = error_of(load(client, "given", "two", load_inplace=True), 400)
    assert "it stays" in error["message"]
    error = error_of(client.post(UNLOAD, json={"lora_name": "given"}), 403)
    assert "was given at the start" in error["message"]
    assert "is the base's name" in error_of(load(client, "embedded", "two"), 400)["message"]
    assert store.names() == ["given"]


def test_nothing_outside_the_folder_is_read_and_the_answer_does_not_tell_what_is_there(
    served, place
):
    client, store = served
    (place / "link").symlink_to(place.parent / "outside")
    (place / "files").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (place / "files" / name).symlink_to(place.parent / "outside" / name)
    (place / "more").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (place / "more" / name).write_bytes((place / "two" / name).read_bytes())
    (place / "more" / "flexlora.json").symlink_to("/etc/hostname")
    (place / "loop").symlink_to(place / "loop")
    outside = [place.parent / "outside", "../outside", "two/../../outside", "link", "files", "more"]
    absent = [place.parent / "none", "../none", "none", "", "loop", "two\x00", "x" * 5000]
    for path in (*outside, *absent):
        error = error_of(load(client, "new", path), 400)
        assert "is no PEFT folder below the one" in error["message"] or len(str(path)) > 400
        assert error["param"] == "lora_path"
    assert store.names() == ["given"]


def test_a_damaged_folder_is_refused_in_a_sentence(served, place):
    client, _ = served
    (place / "two" / "adapter_model.safetensors").write_bytes(b"\x80\x04pickle")
    assert "cannot be read as safetensors" in error_of(load(client, "new", "two"), 400)["message"]
    error_of(client.post(LOAD, json={"lora_name": "new"}), 400)
    error_of(load(client, "a\nb", "one"), 400)


def test_without_the_flag_nothing_is_loaded(base, place):
    with (
        front_of(ObedientEngine(), NoAdapters(), base.tokenizer) as front,
        client_of(front) as client,
    ):
        for answer in (
            load(client, "new", place / "one"),
            client.post(UNLOAD, json={"lora_name": "x"}),
        ):
            assert "started with --allow-loading" in error_of(answer, 403)["message"]


def test_a_bound_on_what_is_loaded(served, monkeypatch):
    client, _ = served
    monkeypatch.setattr("flexlora.serving.api.loading.MAX_LOADED", 1)
    assert load(client, "a", "one").status_code == 200
    assert (
        "1 adapters are loaded; unload one first"
        in error_of(load(client, "b", "two"), 400)["message"]
    )
    assert load(client, "a", "two", load_inplace=True).status_code == 200
