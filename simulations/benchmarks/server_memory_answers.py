"""What is measured, and clients that train nothing: random factors of the shape they are asked for.

A client here is its answers alone: to the query a capability with the model's shapes, to a training
a reply as the product's own encoder makes it, to an evaluation a score. No weights of any model are
needed. What a payload says is read once for all clients of a class, and its factors are not kept.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, MessageType, MetricRecord, RecordDict

import flexlora
from flexlora.clients.messages import (
    decode_train_job,
    encode_capability,
    encode_evaluate_result,
    encode_train_result,
)
from flexlora.config.resolve import Config
from flexlora.evaluation.evaluate import BASE
from flexlora.lora.adapters import Adapter, LoRAFactors
from flexlora.seeds import generator, numpy_generator
from flexlora.simulations.world.clock_models import clock_shape
from flexlora.wire.encoding import DTYPES
from flexlora.wire.jobs import Capability, EvalResult, Score, TrainResult
from flexlora.wire.packing import WIRE_VERSION

__all__ = ["ECHO", "FEDAVG", "Answers", "ServerCase", "content_bytes"]

FEDAVG, ECHO = "fedavg", "echo"
EXAMPLES = 10
SPREAD = 0.02  # of the random numbers


@dataclass(frozen=True, kw_only=True)
class ServerCase:
    """A server and those who answer it.

    Args:
        way: a method by name; ``fedavg``, Flower's own strategy; ``echo``, one message and back.
        replies: clients, all of which train in every round.
        reversed: the last client by name answers first: all but it wait for the first.
        layers: of ``model``; 0 for all.
        echo_bytes: of the one message that is sent back unread.
    """

    way: str
    replies: int
    reversed: bool = False
    model: str = "meta-llama/Llama-2-7b-hf"
    layers: int = 0
    rank: int = 4
    wire_dtype: str = "float32"
    server_max_rank: int = 16
    rounds: int = 1
    echo_bytes: int = 0

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """``(out_features, in_features)`` of every linear."""
        shape = clock_shape(self.model)
        return {
            f"model.layers.{layer}.{linear.name}": (linear.out_features, linear.in_features)
            for layer in range(self.layers or shape.num_layers)
            for linear in shape.linears
        }

    @property
    def reply_bytes(self) -> int:
        """Bytes of the factors in one reply."""
        if self.way == ECHO:
            return self.echo_bytes
        numbers = sum(min(self.rank, *shape) * sum(shape) for shape in self.shapes.values())
        return numbers * DTYPES[self.wire_dtype].itemsize

    def config(self) -> Config:
        """A run in which everybody trains at one rank and one client evaluates the loss.

        Without the bound on norms, for which updates of a first round wait until it is complete.
        """
        return Config.of(
            {
                "method.name": self.way,
                "method.server-max-rank": self.server_max_rank,
                "ranks.policy": "fixed",
                "ranks.fixed": self.rank,
                "num-server-rounds": self.rounds,
                "fraction-train": 1.0,
                "eval.fraction": 0.0,
                "eval.generate": "never",
                "server.min-nodes": self.replies,
                "server.quorum": self.replies,
                "server.skipped-rounds": 0,
                "server.max-norm-ratio": 0.0,
                "wire.dtype": self.wire_dtype,
            }
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> ServerCase:
        values: dict[str, Any] = json.loads(text)
        return ServerCase(**values)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a train message asks for, without its numbers."""

    rank_class: str
    base_round: int
    digest: str
    like: Adapter  # on torch's meta device: shapes and alphas alone


class Answers:
    """The answers of all clients; client ``k`` is named by its place."""

    def __init__(self, case: ServerCase) -> None:
        self.case = case
        self._asked: dict[tuple[int, str], Asked] = {}

    def to(self, message: Message, place: int) -> RecordDict:
        """The content of a reply."""
        content, client_id = message.content, f"site_{place:04d}"
        kind = message.metadata.message_type
        if kind == MessageType.QUERY:
            return encode_capability(self._capability(client_id))
        if kind == MessageType.EVALUATE:
            return _scored(content, client_id)
        if ECHO in content:
            return RecordDict({ECHO: content[ECHO]})
        if "job" in content:
            return self._trained(content, client_id)
        return _averaged(content, client_id)

    def _capability(self, client_id: str) -> Capability:
        shapes = self.case.shapes
        return Capability(
            client_id=client_id,
            num_examples=EXAMPLES,
            version=flexlora.__version__,
            wire_version=WIRE_VERSION,
            fingerprint="shapes alone",
            quantization="none",
            device="none",
            modules=tuple(shapes),
            out_features=tuple(out for out, _ in shapes.values()),
            in_features=tuple(inner for _, inner in shapes.values()),
        )

    def _trained(self, content: RecordDict, client_id: str) -> RecordDict:
        job = content.config_records["job"]
        key = int(str(job["server-round"])), str(job["rank-class"])
        if key not in self._asked:
            self._asked[key] = _asked(content, client_id)
        asked = self._asked[key]
        result = TrainResult(
            client_id=client_id,
            rank_class=asked.rank_class,
            base_round=asked.base_round,
            digest=asked.digest,
            num_examples=EXAMPLES,
            adapter=_random(asked, client_id),
            steps=1,
            tokens=1,
            train_loss=1.0,
            loss_before=1.0,
            loss_after=1.0,
        )
        return encode_train_result(result, dtype=self.case.wire_dtype)


def _asked(content: RecordDict, client_id: str) -> Asked:
    start = decode_train_job(content, client_id).start
    return Asked(
        rank_class=start.rank_class.name,
        base_round=start.base_round,
        digest=start.digest,
        like=start.trained.to("meta"),
    )


def _random(asked: Asked, client_id: str) -> Adapter:
    draw = generator(0, "reply", asked.base_round, client_id)

    def filled(factors: LoRAFactors) -> LoRAFactors:
        def numbers(like: torch.Tensor) -> torch.Tensor:
            return SPREAD * torch.randn(like.shape, generator=draw, dtype=like.dtype)

        return factors.map(numbers)

    return Adapter({name: filled(factors) for name, factors in asked.like.items()})


def _scored(content: RecordDict, client_id: str) -> RecordDict:
    classes: Any = content.config_records["job"]["rank-classes"]
    score = Score(loss=1.0, tokens=1, rows=1)
    names = list(classes) or [BASE]
    return encode_evaluate_result(
        EvalResult(client_id=client_id, scores=dict.fromkeys(names, score))
    )


def _averaged(content: RecordDict, client_id: str) -> RecordDict:
    """What FedAvg expects: arrays like those it sent, and a weight."""
    draw = numpy_generator(0, "reply", client_id)
    arrays = {
        key: Array(SPREAD * draw.standard_normal(array.shape, dtype=np.float32))
        for key, array in content.array_records["arrays"].items()
    }
    metrics = MetricRecord({"num-examples": EXAMPLES, "one": 1})
    return RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics})


def content_bytes(content: RecordDict) -> int:
    """Bytes of all arrays of a content."""
    records = content.array_records.values()
    return sum(len(array.data) for record in records for array in record.values())
