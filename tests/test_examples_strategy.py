"""``examples/own_strategy.py``: its ServerApp and its ClientApp, message by message."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
from flwr.app import Context, RecordDict

from federation import small
from flexlora.clients.worker import worker_for
from flexlora.lora.peft_folder import load_adapter
from flexlora.server.transport.flower_private import set_message_id
from flexlora.simulations.engine.cohorts import CohortLimits
from flexlora.simulations.engine.grid import InProcessGrid
from paths import ROOT


def loaded(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class AppGrid(InProcessGrid):
    """Every message goes through the example's own ClientApp, as a node of Flower calls it."""

    def __init__(self, config, client_app):
        limits = CohortLimits(clients=1)
        super().__init__(worker_for(config), limits=limits, wire_dtype=config.wire.dtype)
        self.config, self.client_app, self.sent = config, client_app, {}

    def push_messages(self, messages):
        for message in messages:
            set_message_id(message, f"message-{len(self.sent)}")
            self.sent[message.metadata.message_id] = message
        return list(self.sent)[-len(messages) :]

    def pull_messages(self, message_ids):
        return [self.answer(self.sent[message_id]) for message_id in message_ids]

    def answer(self, message):
        node = message.metadata.dst_node_id
        place = {"partition-id": node - 1, "num-partitions": len(self._clients)}
        context = Context(1, node, place, RecordDict(), self.config.flat())
        return self.client_app(message, context)


def test_the_apps_train_evaluate_and_save_the_best_round(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    example = loaded(ROOT / "examples" / "own_strategy.py")
    config = small(num_server_rounds=2)
    grid = AppGrid(config, example.client_app)
    example.server_app(grid, Context(1, 0, {}, RecordDict(), config.flat()))
    *rounds, last = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in rounds] == ["round 0", "round 1", "round 2"]
    losses = [float(line.split()[-1]) for line in rounds]
    assert f"eval_loss {min(losses):.3f}" in last and "saved in own_adapter" in last
    assert len(load_adapter(tmp_path / "own_adapter")) > 0


@pytest.mark.slow
@pytest.mark.nightly
def test_the_command_at_its_top_runs(tmp_path):
    command = [sys.executable, ROOT / "examples" / "own_strategy.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "own_adapter" / "adapter_model.safetensors").is_file()
