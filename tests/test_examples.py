"""The programs in ``examples/`` run, and the method written by hand is the engine's."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch

import reference
from builders import random_adapter
from flexlora import Adapter, LoRAFactors, load_adapter, save_adapter
from flexlora.aggregation import make_method
from flexlora.aggregation.engine.open_round import OpenRound
from flexlora.aggregation.engine.starts import Factoring
from flexlora.aggregation.engine.state import GlobalChange, State
from flexlora.aggregation.engine.updates import Update
from flexlora.lora.ranks import RankClass
from paths import ROOT

EXAMPLES = ROOT / "examples"


@pytest.fixture
def by_hand():
    """The module, in float64 for as long as the test runs."""
    spec = importlib.util.spec_from_file_location("by_hand", EXAMPLES / "flexlora_by_hand.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.set_default_dtype(torch.float64)
    yield module
    torch.set_default_dtype(torch.float32)


def factors(B, A, alpha):
    return Adapter({"w": LoRAFactors(lora_A=A, lora_B=B, alpha=alpha)})


def test_the_paper_by_hand_and_the_engine_agree_on_the_sum_and_on_every_truncation(by_hand):
    method = make_method("flexlora")
    state = State(
        round=0, change=GlobalChange.zero({"w": (by_hand.OUT, by_hand.IN)}, torch.float64)
    )
    losses = []
    for sent, updates, G, loss in by_hand.federation():
        for (B, A), rank in zip(sent, by_hand.RANKS, strict=True):
            start = method.start(state, RankClass.of(rank), Factoring(alpha=by_hand.ALPHA))
            ours, theirs = start.trained.delta_weight("w"), by_hand.ALPHA / rank * B @ A
            assert float((ours - theirs).abs().max()) < 1e-9
        opened = OpenRound(method, state, {})
        for k, (B, A, n) in enumerate(updates):
            adapter = factors(B, A, by_hand.ALPHA)
            opened.add(Update(client_id=f"c{k}", adapter=adapter, num_examples=n))
        state = opened.close()
        assert float((state.change.delta_weight("w") - G).abs().max()) < 1e-9
        losses.append(loss)
    assert state.round == by_hand.ROUNDS and losses[-1] < 0.3 * losses[0]


def test_the_paper_by_hand_imports_torch_alone_and_prints_its_rounds():
    program = EXAMPLES / "flexlora_by_hand.py"
    assert "flexlora." not in program.read_text().replace("flexlora_by_hand", "")
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, check=True)
    assert done.stdout.count("loss") == 5 and not done.stderr


def test_folders_in_one_folder_out(tmp_path):
    shapes = {"layer.q_proj": (12, 8), "layer.v_proj": (6, 8)}
    clients = {}
    for k, (rank, n) in enumerate([(2, 120), (4, 80)]):
        adapter = random_adapter(shapes, rank, seed=k, dtype=torch.float32)
        save_adapter(adapter, tmp_path / f"client_{k}", base="some/model")
        clients[tmp_path / f"client_{k}"] = (adapter, n)
    arguments = [f"{folder}={n}" for folder, (_, n) in clients.items()]
    command = [sys.executable, EXAMPLES / "aggregate_folders.py", tmp_path / "out", "--rank", "3"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("2 adapters ->")
    out = load_adapter(tmp_path / "out")
    for name in shapes:
        dense = reference.flexlora_average(list(clients.values()), name)
        expected = reference.truncate(dense.double(), 3)
        assert reference.relative_error(out.delta_weight(name).double(), expected) < 1e-5
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "some/model" and written["r"] == 3
