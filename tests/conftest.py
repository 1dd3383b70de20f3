"""What all tests share: one torch thread, no network, and tiny models by name."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded

import pytest
import torch

import builders

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)  # the matrices are tiny, and two busy cores make threads wait


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
