"""What a fleet benchmark runs: a server, its stub nodes, and what each of them answers.

The nodes train nothing. To the query a node answers with a capability, to a training with the start
it was sent plus a small change of its own, to an evaluation with a score. All go through the
product's own encoder, so that a reply has the size, the dtype and the objects of a real one.
"""

from __future__ import annotations

import json
import ssl
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flwr.app import Message, MessageType, RecordDict

import flexlora
from flexlora.aggregation.engine.starts import Start
from flexlora.clients.messages import (
    decode_train_job,
    encode_capability,
    encode_evaluate_result,
    encode_train_result,
)
from flexlora.clients.worker import Worker
from flexlora.config.resolve import Config
from flexlora.evaluation.evaluate import BASE
from flexlora.lora.adapters import Adapter
from flexlora.planning.model_config import read_shape
from flexlora.simulations.benchmarks.fleet_node import StubNode
from flexlora.wire.jobs import Capability, EvalResult, Score, TrainResult

__all__ = ["Answers", "FleetCase", "FleetNode"]

EXAMPLES = 10
CHANGE = 1e-3  # of every number of lora_B, times a node's own factor from 1 to 2
REAL = {"train.max-steps": 2, "train.max-length": 128, "engine.threads": 1}
SMOLLM2 = {  # HuggingFaceTB/SmolLM2-135M: 210 linear modules
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}


@dataclass(frozen=True, kw_only=True)
class FleetCase:
    """One federation.

    Args:
        model: ``embedded``, or ``smollm2-135m`` by shapes alone.
        stored: the SuperLink has a database file, as in a deployment.
        real: SuperNodes with resident trainers, which train.
        delay_ms, bytes_per_second: of each node's own link; 0 is none, and no limit.
        settings: of the run, beside those that the case sets.
        limit_seconds: after which the run is given up; what it has done by then is reported.
    """

    nodes: int
    rounds: int
    model: str = "embedded"
    tls: bool = False
    stored: bool = True
    real: bool = False
    delay_ms: float = 0.0
    bytes_per_second: float = 0.0
    settings: tuple[str, ...] = ()
    limit_seconds: float = 1200.0

    def config(self, home: Path) -> Config:
        """A run of everybody in every round; files that it reads are written below ``home``."""
        model = self.model
        if model != "embedded":
            model = str(home / "base")
            (home / "base").mkdir(exist_ok=True)
            (home / "base" / "config.json").write_text(json.dumps(SMOLLM2), encoding="utf-8")
        values = {
            "model.name": model,
            "num-server-rounds": self.rounds,
            "fraction-train": 1.0,
            "eval.generate": "never",
            "server.min-nodes": self.nodes,
            "server.quorum": self.nodes,
            "server.wait-seconds": self.limit_seconds,
            "server.round-timeout-seconds": self.limit_seconds,
            "out": str(home / "run"),
            **(REAL if self.real else {}),
        }
        pairs = [f"{key}={value}" for key, value in values.items()]
        return Config.resolve(sets=[*pairs, *self.settings])

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> FleetCase:
        values: dict[str, Any] = json.loads(text)
        return FleetCase(**{**values, "settings": tuple(values["settings"])})


class Answers:
    """The replies of all nodes of a case. A start is decoded once for all nodes of its class."""

    def __init__(self, config: Config) -> None:
        self.dtype = config.wire.dtype
        self._capability = _capability(config)
        self._starts: dict[tuple[int, str], Start] = {}

    def to(self, message: Message, place: int) -> RecordDict:
        """What the node at this place replies."""
        client_id, kind = f"site_{place:04d}", message.metadata.message_type
        if kind == MessageType.QUERY:
            return encode_capability(replace(self._capability, client_id=client_id))
        job: Any = message.content.config_records["job"]
        if kind == MessageType.EVALUATE:
            # Of its own, since the SuperLink stores equal records of all nodes once.
            names = list(job["rank-classes"]) or [BASE]
            scores = {
                name: Score(loss=1.0 + 1e-6 * place + 1e-3 * order, tokens=1, rows=1)
                for order, name in enumerate(names)
            }
            return encode_evaluate_result(EvalResult(client_id=client_id, scores=scores))
        key = int(job["server-round"]), str(job["rank-class"])
        if key not in self._starts:
            self._starts[key] = decode_train_job(message.content, client_id).start
        start = self._starts[key].for_client(client_id)
        return encode_train_result(_trained(start, client_id, place), dtype=self.dtype, start=start)


def _trained(start: Start, client_id: str, place: int) -> TrainResult:
    change = CHANGE * (1.0 + place % 997 / 997)
    adapter = {
        name: replace(factors, lora_B=factors.lora_B + change)
        for name, factors in start.trained.items()
    }
    return TrainResult(
        client_id=client_id,
        rank_class=start.rank_class.name,
        base_round=start.base_round,
        digest=start.digest,
        num_examples=EXAMPLES,
        adapter=Adapter(adapter),
        steps=1,
        tokens=1,
        train_loss=1.0,
        loss_before=1.0,
        loss_after=1.0,
    )


def _capability(config: Config) -> Capability:
    """The embedded base's as a worker reports it; of another model the shapes alone."""
    if config.model.name == "embedded":
        worker = Worker(config)
        capability = worker.capability(worker.client_ids[0], probed=False)
        return replace(capability, num_examples=EXAMPLES, cause="")
    shape = read_shape(config.model.name)
    shapes = {
        f"model.layers.{layer}.{linear.name}": (linear.out_features, linear.in_features)
        for layer in range(shape.num_layers)
        for linear in shape.linears
    }
    return Capability(
        client_id="",
        num_examples=EXAMPLES,
        version=flexlora.__version__,
        fingerprint="shapes alone",
        quantization="none",
        device="none",
        modules=tuple(shapes),
        out_features=tuple(out for out, _ in shapes.values()),
        in_features=tuple(inner for _, inner in shapes.values()),
    )


class FleetNode(StubNode):
    """A node of the benchmark; ``place`` makes its name and its change."""

    def __init__(
        self, address: str, place: int, answers: Answers, tls: ssl.SSLContext | None = None
    ) -> None:
        super().__init__(address, name=f"site_{place:04d}", tls=tls)
        self.place, self.answers = place, answers

    def answer(self, message: Message) -> RecordDict:
        return self.answers.to(message, self.place)
