"""Stub nodes that answer as FlexLoRA's clients do: a capability, and factors moved a little."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import MessageType

from flexlora.clients.messages import (
    decode_train_job,
    encode_capability,
    encode_evaluate_result,
    encode_train_result,
)
from flexlora.clients.worker import Worker
from flexlora.config.resolve import Config
from flexlora.lora.adapters import Adapter
from flexlora.simulations.benchmarks.fleet_node import StubNode
from flexlora.wire.jobs import EvalResult, Score, TrainResult


@cache
def embedded_capability(targets):
    """What a node with the embedded base says of itself."""
    worker = Worker(Config.of({"clients.count": 1, "lora.target-modules": targets}))
    shown = worker.capability(worker.client_ids[0], probed=False)
    return replace(shown, num_examples=10, cause="")


class FleetNode(StubNode):
    """The node of an enrolled folder; ``report`` changes what it says of itself."""

    def __init__(self, address, folder, *, tls, targets, report=None):
        key = load_ssh_private_key((folder / "keys" / "node").read_bytes(), None)
        super().__init__(address, name=folder.name, key=key, tls=tls)
        own = replace(embedded_capability(targets), client_id=folder.name)
        self.capability = replace(own, **(report or {}))

    def answer(self, message):
        kind = message.metadata.message_type
        if kind == MessageType.QUERY:
            return encode_capability(self.capability)
        if kind == MessageType.EVALUATE:
            score = Score(loss=1.0, tokens=1, rows=1)
            names = message.content["job"]["rank-classes"]
            scores = dict.fromkeys(names, score)
            return encode_evaluate_result(EvalResult(client_id=self.name, scores=scores))
        start = decode_train_job(message.content, self.name).start.for_client(self.name)
        moved = {k: replace(f, lora_B=f.lora_B + 1e-3) for k, f in start.trained.items()}
        result = TrainResult(
            client_id=self.name,
            rank_class=start.rank_class.name,
            base_round=start.base_round,
            digest=start.digest,
            num_examples=10,
            adapter=Adapter(moved),
            steps=1,
            tokens=1,
            train_loss=1.0,
            loss_before=1.0,
            loss_after=1.0,
        )
        return encode_train_result(result, dtype="float32", start=start)
