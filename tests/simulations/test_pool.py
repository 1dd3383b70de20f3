"""The pool of one process, and what a pool of several is made of before Ray is started."""

from __future__ import annotations

import subprocess
import sys
import weakref

import pytest
import torch

from builders import random_adapter, train_job
from federation import small
from flexlora.errors import UserError
from flexlora.lora.adapters import Adapter
from flexlora.simulations.engine import ray_start
from flexlora.simulations.engine.pool import LocalPool, make_pool
from flexlora.simulations.engine.ray_actor import Key, Parcel, pack, swapped, unpack
from flexlora.simulations.engine.ray_start import Need, Session, placement
from flexlora.wire.jobs import EvalJob


def cohorts(worker, carried=None):
    """Two cohorts of two clients at ranks 2 and 4."""
    starts = [random_adapter(worker.slots.shapes, r, seed=r, dtype=torch.float32) for r in (2, 4)]
    jobs = [train_job(starts[k % 2], c, carried=carried) for k, c in enumerate(worker.client_ids)]
    return [jobs[:2], jobs[2:]]


class Recording:
    """A worker that notes which cohorts were worked on, and in which order."""

    def __init__(self, worker):
        self.worker, self.calls = worker, []

    def train(self, jobs):
        self.calls.append([job.client_id for job in jobs])
        return self.worker.train(jobs)

    def evaluate(self, jobs):
        self.calls.append([f"evaluate {job.client_id}" for job in jobs])
        return self.worker.evaluate(jobs)


def test_a_cohort_is_trained_when_it_is_asked_for_and_once(worker):
    recording, (first, second) = Recording(worker), cohorts(worker)
    pool = LocalPool(recording)
    pending = [pool.train(first), pool.train(second)]
    assert recording.calls == []
    later = pending[1].result()
    assert recording.calls == [[job.client_id for job in second]]
    assert pending[1].result() is later and len(recording.calls) == 1
    pending[0].result()
    assert recording.calls[1:] == [[job.client_id for job in first]]
    pool.close()


def test_the_results_are_those_of_the_worker(worker):
    for jobs in cohorts(worker):
        pooled, direct = LocalPool(worker).train(jobs).result(), worker.train(jobs)
        assert [r.client_id for r in pooled] == [job.client_id for job in jobs]
        assert [r.adapter.digest() for r in pooled] == [r.adapter.digest() for r in direct]
        assert pooled[0].adapter.digest() != jobs[0].start.trained.digest(), "nothing was trained"
    adapters = {"rank_2": jobs[0].start.trained}
    asked = [EvalJob(client_id=c, server_round=1, adapters=adapters) for c in worker.client_ids]
    assert LocalPool(worker).evaluate(asked).result() == worker.evaluate(asked)


def test_a_cohort_that_was_trained_no_longer_holds_what_it_started_from(worker):
    jobs = cohorts(worker)[0]
    pending, first = LocalPool(worker).train(jobs), weakref.ref(jobs[0])
    del jobs
    assert first() is not None
    pending.result()
    assert first() is None


def test_a_client_that_fails_is_a_result_with_a_cause(worker):
    good = cohorts(worker)[0][0]
    bad = train_job(random_adapter({"nobody": (4, 4)}, 2, dtype=torch.float32), "client_01")
    kept, failed = LocalPool(worker).train([good, bad]).result()
    assert kept.adapter is not None and not kept.cause
    assert failed.adapter is None and "is in the model only" in failed.cause


def test_one_worker_without_an_address_needs_no_other_process(worker):
    assert make_pool(small(), worker).worker is worker
    assert make_pool(small()).worker.client_ids == worker.client_ids


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine__workers": 2}, r"engine.workers is 2, which needs Ray; pip install 'flexlora\["),
        ({"engine__ray_address": "here:1"}, "engine.ray-address is 'here:1', which needs Ray"),
    ],
)
def test_without_ray_one_sentence_says_what_to_install(monkeypatch, changes, message):
    monkeypatch.setattr(ray_start, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=message):
        make_pool(small(**changes))


@pytest.mark.parametrize("address", ["head", "ray://head:10001", "head:", "a b:1", "auto"])
def test_an_address_that_is_none_is_refused_before_anything_starts(address):
    with pytest.raises(UserError, match=f"engine.ray-address is '{address}', expected HOST:PORT"):
        make_pool(small(engine__ray_address=address))


def test_a_pool_of_processes_can_be_asked_for_before_anything_heavy_is_loaded():
    """The main process loads torch, base and data while Ray starts."""
    code = "from flexlora.simulations.engine import pool, ray_pool; import sys; print([m for m in "
    code += "('torch', 'numpy', 'ray', 'transformers', 'flwr') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_parcel_is_the_adapter_bit_for_bit(dtype):
    shapes = {"b": (3, 5), "a": (7, 2)}
    adapter = random_adapter(shapes, [3, 1], alpha=[4.0, 1.5], rslora=True, dtype=dtype)
    arrived = unpack(pack(adapter))
    assert arrived.digest() == adapter.digest()
    first, second = arrived["a"].lora_A, adapter["a"].lora_A
    assert first.data_ptr() != second.data_ptr(), "what arrives must not be Ray's read-only memory"


def test_jobs_name_what_they_share_and_share_it_again_afterwards():
    shapes = {"a": (6, 4)}
    carried, starts = random_adapter(shapes, 4, seed=9), [random_adapter(shapes, r) for r in (1, 2)]
    jobs = [train_job(starts[k], f"c{k}", carried=carried) for k in (0, 1)]
    jobs.append(EvalJob(client_id="c0", server_round=1, adapters={"rank_1": starts[0]}))
    names = {id(adapter): Key(f"name {k}") for k, adapter in enumerate([carried, *starts])}
    slim = [swapped(job, Adapter, lambda adapter: names[id(adapter)]) for job in jobs]
    assert slim[0].start.carried == slim[1].start.carried == "name 0"
    assert slim[2].adapters == {"rank_1": "name 1"}
    parcels = {names[id(adapter)]: pack(adapter) for adapter in (carried, *starts)}
    assert all(isinstance(parcel, Parcel) for parcel in parcels.values())
    arrived = {name: unpack(parcel) for name, parcel in parcels.items()}
    whole = [swapped(job, Key, arrived.__getitem__) for job in slim]
    assert whole[0].start.carried is whole[1].start.carried
    assert [job.start.sealed().digest for job in whole[:2]] == [j.start.digest for j in jobs[:2]]
    assert whole[2].adapters["rank_1"] is whole[0].start.trained
    assert whole[0].start.rank_class is jobs[0].start.rank_class, "what holds no adapter stays"


def training(config):
    return Need.of(config).training_bytes


def placed(config, session, workers):
    return placement(config, session, workers, Need.of(config))


def test_a_worker_needs_more_for_more_clients_rows_and_ranks():
    least = training(small(engine__cohort_size=1))
    assert training(small()) > least > Need.of(small()).loaded_bytes
    assert training(small(engine__cohort_size=2)) > least
    assert training(small(engine__cohort_size=9, engine__cohort_tokens=256)) == least
    assert training(small(engine__cohort_tokens=2 * 256)) == training(small(engine__cohort_size=2))
    assert training(small(engine__cohort_size=1, train__max_length=256)) > least
    assert training(small(engine__cohort_size=1, ranks__tiers="2,64")) > least
    assert training(small(engine__cohort_size=1, clients__quantization="nf4:0.5")) > least
    paper = small(ranks__policy="paper:normal", ranks__scale=0.5)
    assert training(paper) > training(small()), "rank 100 against rank 4"


def test_of_a_model_that_cannot_be_predicted_the_files_count():
    unknown = small(lora__target_modules=r".*\.(q|v)_proj")  # an expression: no prediction
    need = Need.of(unknown)
    weights = need.training_bytes - need.loaded_bytes
    assert weights == need.loaded_bytes - ray_start.RUNTIME_BYTES
    assert 3e6 < weights < 5e6, "the embedded base has 920,832 float32 numbers"


GB = 10**9


def node(memory, cpus=8, graphics=0):
    return {"Alive": True, "Resources": {"memory": memory, "CPU": cpus, "GPU": graphics}}


@pytest.fixture
def cluster(monkeypatch):
    """``cluster(node(...), ...)`` is what Ray says there is."""
    ray = ray_start.import_ray(workers=1, address="")

    def settle(*nodes):
        monkeypatch.setattr(ray, "nodes", lambda: list(nodes))

    return settle


def test_workers_ask_for_their_memory_and_for_a_gpu_where_there_is_one(cluster):
    config, joined = small(engine__threads=3), Session()
    cluster(node(9 * GB))
    asked = placed(config, joined, 2)
    assert asked == {"memory": training(config), "num_cpus": 3}
    cluster(node(9 * GB, graphics=2))
    asked = placed(config, joined, 2)
    memory = Need.of(config).loaded_bytes  # the training is on the card
    assert asked == {"memory": memory, "num_cpus": 3, "num_gpus": 1}
    assert "num_gpus" not in placed(small(engine__device="cpu"), joined, 2)
    with pytest.raises(UserError, match=r"engine.workers is 3, .* room for 2: .* a GPU"):
        placed(config, joined, 3)


def test_too_little_memory_is_one_sentence_with_the_largest_number_that_fits(cluster, tmp_path):
    need = training(small())
    cluster(node(2.5 * need), node(1.5 * need))
    assert placed(small(), Session(), 3)
    with pytest.raises(UserError, match=r"is 4, but the Ray cluster has room for 3: .*workers=3"):
        placed(small(), Session(), 4)
    cluster(node(99 * GB))
    with pytest.raises(UserError, match=r"room for 2: .* 3 CPUs \(engine.threads\)"):
        placed(small(engine__threads=3), Session(), 3)
    cluster(node(0.5 * need))
    with pytest.raises(UserError, match=r"is 2, but this machine has room for 0: .* at 1"):
        placed(small(), Session(folder=tmp_path), 2)
    cluster(node(2.5 * need))
    with pytest.raises(UserError, match=r"is 4, but the Ray cluster has room for 3: .*workers=3"):
        placement(small(), Session(), 3, Need.of(small()), here=1)


def test_a_dead_machine_has_no_room(cluster):
    gone = {**node(99 * GB), "Alive": False}
    cluster(gone, node(99 * GB, cpus=1))
    with pytest.raises(UserError, match="room for 1"):
        placed(small(), Session(), 2)


def test_cuda_without_a_gpu_is_refused(cluster):
    cluster(node(99 * GB))
    with pytest.raises(UserError, match=r"engine.device is 'cuda' but Ray sees no GPU"):
        placed(small(engine__device="cuda"), Session(), 1)
