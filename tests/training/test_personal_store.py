"""Where own factors lie: per client and round, on disk or in memory, and what is found again."""

import struct
from dataclasses import replace

import pytest
import torch

from builders import random_adapter, train_job
from flexlora.errors import UserError
from flexlora.training.personal import PersonalStore
from flexlora.wire.jobs import EvalJob, TrainResult

HOSTILE = [
    "../../etc/passwd",
    "/absolute",
    "a/b\\c",
    "",
    ".",
    "nul\0byte",
    "x" * 5000,
    "Ω client, with spaces",
    "\ud800 half a pair",
    "CLIENT",
    "client",
]


@pytest.fixture(params=["memory", "folder"])
def store(request, tmp_path):
    return PersonalStore(tmp_path / "personal" if request.param == "folder" else None)


def job_of(shapes, client_id, server_round=1, rank=3):
    return train_job(random_adapter(shapes, rank), client_id, server_round=server_round)


def result_of(job, personal):
    return TrainResult(
        client_id=job.client_id,
        rank_class=job.start.rank_class.name,
        base_round=job.start.base_round,
        digest=job.start.digest,
        adapter=job.start.trained,
        personal=personal,
    )


def keep(store, shapes, client_id, server_round, *, seed=None, rank=3):
    """One client's factors of one round, told apart by their seed."""
    own = random_adapter(shapes, 2, seed=server_round if seed is None else seed)
    job = job_of(shapes, client_id, server_round, rank)
    store.keep([result_of(job, own)], [job])
    return own


def found(store, shapes, client_id, server_round):
    (job,) = store.attach([job_of(shapes, client_id, server_round)])
    return None if job.personal is None else job.personal.digest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_kept_is_found_bit_by_bit(store, shapes, dtype):
    own = random_adapter(shapes, [1, 4], alpha=[3.0, 0.7], rslora=True, dtype=dtype)
    job = job_of(shapes, "a")
    store.keep([result_of(job, own)], [job])
    kept = store.before("a", 2)
    assert kept.adapter.digest() == own.digest()
    assert (kept.client_id, kept.server_round, kept.rank_class) == ("a", 1, "rank_3")


def test_factors_that_a_client_will_have_are_not_scored_before_it_has_them(store, shapes):
    """On a simulated clock: those of round 1 from the start, those of round 2 from 90.5 s on."""
    first = keep(store, shapes, "a", 1)
    job = job_of(shapes, "a", 2)
    second = random_adapter(shapes, 2, seed=2)
    store.keep([result_of(job, second)], [job], since=90.5)
    classes = {"rank_3": random_adapter(shapes, 3)}
    asked = EvalJob(client_id="a", server_round=2, adapters=classes)
    for now, own in ((0.0, first), (90.4, first), (90.5, second), (1e9, second)):
        (attached,) = store.attach_eval([asked], now=now)
        assert attached.personal.digest() == own.digest()
    assert store.attach_eval([asked])[0].personal.digest() == second.digest()
    assert found(store, shapes, "a", 3) == second.digest(), "what is trained next goes on from them"


def test_a_job_is_given_what_its_client_had_before_the_round(store, shapes):
    assert found(store, shapes, "a", 1) is None
    first = keep(store, shapes, "a", 1)
    assert found(store, shapes, "a", 1) is None
    assert found(store, shapes, "a", 2) == first.digest()
    assert found(store, shapes, "b", 2) is None
    third = keep(store, shapes, "a", 3)
    assert found(store, shapes, "a", 3) == first.digest()
    assert found(store, shapes, "a", 9) == third.digest()


def test_a_run_that_repeats_a_round_finds_what_was_before_it(store, shapes):
    """The last two rounds are kept: round 5 is repeated from what round 2 left."""
    keep(store, shapes, "a", 1)
    second = keep(store, shapes, "a", 2)
    keep(store, shapes, "a", 5, seed=77)
    assert found(store, shapes, "a", 5) == second.digest()
    again = keep(store, shapes, "a", 5)
    assert found(store, shapes, "a", 5) == second.digest()
    assert found(store, shapes, "a", 6) == again.digest()
    assert found(store, shapes, "a", 2) is None, "round 1 should be gone"


def test_a_late_round_does_not_drop_the_one_that_came_after_it(store, shapes):
    late = random_adapter(shapes, 2, seed=4)
    after = keep(store, shapes, "a", 5)
    job = job_of(shapes, "a", 4)
    store.keep([result_of(job, late)], [job])
    assert found(store, shapes, "a", 6) == after.digest()
    assert found(store, shapes, "a", 5) == late.digest()


def test_who_trained_nothing_of_its_own_keeps_what_it_had(store, shapes):
    first = keep(store, shapes, "a", 1)
    job = job_of(shapes, "a", 2)
    store.keep([result_of(job, None)], [job])
    assert found(store, shapes, "a", 3) == first.digest()


def test_a_later_store_on_the_same_folder_goes_on(tmp_path, shapes):
    own = keep(PersonalStore(tmp_path), shapes, "a", 1)
    assert found(PersonalStore(tmp_path), shapes, "a", 2) == own.digest()
    assert found(PersonalStore(), shapes, "a", 2) is None


def test_a_store_without_anything_to_keep_makes_no_folder(tmp_path, shapes):
    store = PersonalStore(tmp_path / "personal")
    assert found(store, shapes, "a", 3) is None
    store.keep([result_of(job_of(shapes, "a"), None)], [job_of(shapes, "a")])
    assert not (tmp_path / "personal").exists()


def test_hostile_names_stay_apart_and_inside_the_folder(tmp_path, shapes):
    store = PersonalStore(tmp_path / "inside")
    owns = {name: keep(store, shapes, name, 1, seed=k) for k, name in enumerate(HOSTILE)}
    for name, own in owns.items():
        assert found(store, shapes, name, 2) == own.digest(), repr(name)
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]
    folders = [path.name for path in (tmp_path / "inside").iterdir()]
    assert len(folders) == len(HOSTILE)
    assert len({name.lower() for name in folders}) == len(HOSTILE), "a file system may fold case"
    assert all(len(name) < 80 and name.isascii() for name in folders)


def the_file(folder):
    (path,) = folder.rglob("*.safetensors")
    return path


def test_files_are_safetensors_and_nothing_half_written_is_read(tmp_path, shapes):
    folder = tmp_path / "own"
    own = keep(PersonalStore(folder), shapes, "a", 1)
    path = the_file(folder)
    data = path.read_bytes()
    (header,) = struct.unpack("<Q", data[:8])
    assert data[8:9] == b"{" and 8 + header < len(data)
    assert folder.stat().st_mode & 0o077 == 0, "others of this machine may look"
    path.with_name("round-000002.safetensors.partial").write_bytes(data[:50])
    assert found(PersonalStore(folder), shapes, "a", 3) == own.digest()


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-5], lambda data: b"", lambda data: b"\x80\x04." + data],
    ids=["short", "empty", "other"],
)
def test_a_damaged_file_is_told(tmp_path, shapes, damage):
    keep(PersonalStore(tmp_path), shapes, "a", 1)
    path = the_file(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"client a: the personal factors in .* cannot be read"):
        PersonalStore(tmp_path).attach([job_of(shapes, "a", 2)])


def test_another_clients_file_is_refused(tmp_path, shapes):
    store = PersonalStore(tmp_path)
    keep(store, shapes, "a", 1)
    path = the_file(tmp_path)
    keep(store, shapes, "b", 1)
    (other,) = set(tmp_path.rglob("*.safetensors")) - {path}
    other.write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=r"client b: .* \(it belongs to client 'a'"):
        store.before("b", 2)


def eval_job(shapes, client_id, server_round, classes=("rank_3", "rank_5")):
    adapters = {name: random_adapter(shapes, 3) for name in classes}
    return EvalJob(client_id=client_id, server_round=server_round, adapters=adapters)


def test_an_evaluation_is_over_the_class_that_the_client_last_trained_in(store, shapes):
    first = keep(store, shapes, "a", 1, rank=5)
    second = keep(store, shapes, "a", 2, rank=3)
    jobs = [eval_job(shapes, "a", at) for at in (0, 1, 2, 7)] + [eval_job(shapes, "b", 2)]
    attached = store.attach_eval(jobs)
    given = [job.personal and job.personal.digest() for job in attached]
    assert given == [None, first.digest(), second.digest(), second.digest(), None]
    assert [job.personal_over for job in attached] == ["", "rank_5", "rank_3", "rank_3", ""]
    assert [replace(job, personal=None, personal_over="") for job in attached] == jobs


def test_a_client_whose_class_is_served_no_more_is_scored_without(store, shapes):
    keep(store, shapes, "a", 1, rank=4)
    for classes in (("rank_2",), ()):
        (job,) = store.attach_eval([eval_job(shapes, "a", 1, classes)])
        assert job.personal is None and job.personal_over == ""
