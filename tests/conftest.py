"""What all tests share: one torch thread, no network, no wait for the disk, tiny models by name."""

import gc
import os
import signal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded

import hypothesis
import pytest
import torch

import builders
from flexlora.config import resolve

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)  # the matrices are tiny, and two busy cores make threads wait
resolve.free_cores = lambda: 1  # the same, and no look at the cores for 0.2 s before each run
os.fsync = os.fstat  # refuses what is not open, and waits for no disk: no test cuts the power
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job: tests send Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

# Files that mostly wait for processes, the longest first: other workers use the cores meanwhile.
WAITING = (
    "system/test_federation_faults.py",
    "system/test_federation.py",
    "system/test_supervised_nodes.py",
    "system/test_init_walkthrough.py",
    "clients/test_trainer_process.py",
    "system/test_flower.py",
    "simulations/test_cohort_benchmark.py",
    "system/test_real_superlink.py",
    "simulations/test_simulate.py",
    "system/test_resume.py",
)


def pytest_collection_modifyitems(items):
    """The files that wait come first; nightly tests are skipped by day."""
    if os.environ.get("FLEXLORA_NIGHTLY") != "1":
        for item in items:
            if item.get_closest_marker("nightly"):
                item.add_marker(pytest.mark.skip(reason="nightly: set FLEXLORA_NIGHTLY=1"))
    places = {name: place for place, name in enumerate(WAITING)}
    items.sort(key=lambda item: places.get("/".join(item.path.parts[-2:]), len(places)))


def pytest_collection_finish(session):
    """What is loaded by now stays: no later garbage collection walks through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=builders.ARCHITECTURES)
def architecture(request):
    """The name of each supported architecture in turn."""
    return request.param


@pytest.fixture
def llama():
    """A tiny frozen Llama in float64."""
    return builders.tiny_model("llama")


@pytest.fixture
def shapes():
    """Three modules with unequal sides: (out_features, in_features) by name."""
    return {"attn.q": (12, 12), "attn.v": (6, 12), "mlp.up": (20, 12)}


@pytest.fixture(scope="module")
def worker(request):
    """A worker of the module's ``WORKER_CONFIG``, of ``small()`` where it has none."""
    from federation import small
    from flexlora.clients.worker import Worker

    return Worker(getattr(request.module, "WORKER_CONFIG", None) or small())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a module's certificates are written."""
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def ca(folder):
    """A certificate authority, as files."""
    import tls_servers

    return tls_servers.authority(folder)


@pytest.fixture(scope="module")
def leaf(folder, ca):
    """A server's certificate for the names of this machine, as files."""
    import tls_servers

    return tls_servers.server(folder, ca)


@pytest.fixture
def no_proxy(monkeypatch):
    """No proxy in the environment."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
