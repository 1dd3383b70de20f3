"""What all tests share: one torch thread, no network, and tiny models by name."""

import os

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
