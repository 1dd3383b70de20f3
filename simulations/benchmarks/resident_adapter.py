"""A large adapter through the resident trainer's socket: seconds, and memory on both sides.

    python -m flexlora.simulations.benchmarks.resident --adapter llama-2-7b --rank 64

The factors have the shapes of a public model whose weights are not needed: the trainer is the
product's, over the embedded base, but where it would train it hands the factors back. Everything
else is done as ever: digest, stream, decoding to float32, encoding, the copy on disk. ClientApp and
trainer are processes of their own; each says how far its peak grew.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from flexlora.aggregation.engine.starts import Start
from flexlora.clients.trainer.client import ask
from flexlora.clients.trainer.owner_config import OwnerConfig
from flexlora.clients.trainer.reply_store import ReplyStore
from flexlora.clients.trainer.resident import ResidentTrainer
from flexlora.clients.trainer.service import Limits, TrainerService, listen, stop
from flexlora.clients.worker import Worker
from flexlora.config.resolve import Config
from flexlora.lora.adapters import Adapter, LoRAFactors
from flexlora.lora.ranks import RankClass
from flexlora.seeds import generator
from flexlora.server.transport.messages import content_bytes, encode_train_job, pack
from flexlora.simulations.benchmarks.process_memory import peak_bytes, reset_peak, settled_bytes
from flexlora.simulations.world.clock_models import CLOCK_MODELS, clock_shape
from flexlora.wire.encoding import DTYPES
from flexlora.wire.jobs import TrainJob, TrainResult
from flexlora.wire.packing import DATA, PACKED

__all__ = ["AdapterRow", "adapter_rows", "random_adapter"]

CLIENT_TARGET = 0.5  # beyond message and reply; a second copy of the message would be 1
RUN, NODE = 1, 2
GIBIBYTE = 2**30


@dataclass(frozen=True, kw_only=True)
class AdapterRow:
    """One side's memory in messages, and the seconds from the question to the last byte back."""

    name: str
    ratio: float
    target: float
    error: float
    megabytes: float
    message_megabytes: float
    seconds: float

    @property
    def met(self) -> bool:
        return self.ratio <= self.target and self.error == 0.0


def adapter_rows(model: str, rank: int, wire_dtype: str, data: Path) -> list[AdapterRow]:
    """Both sides, and the same question again, which is answered from disk.

    Raises:
        UserError: a model that is not known.
    """
    shapes(model)  # an unknown name is refused before anything is started
    with tempfile.TemporaryDirectory(prefix="flexlora-") as name:
        command = [sys.executable, "-m", __name__]
        place = ["--folder", name, "--data", str(data)]
        asked = ["--model", model, "--rank", str(rank), "--wire-dtype", wire_dtype]
        with subprocess.Popen(
            [*command, "serve", *place], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as trainer:
            assert trainer.stdin is not None and trainer.stdout is not None
            trainer.stdout.readline()
            done = subprocess.run(
                [*command, "ask", *place, *asked], stdout=subprocess.PIPE, text=True, check=True
            )
            trainer.stdin.close()
            theirs = json.loads(trainer.stdout.readline())
    ours = json.loads(done.stdout)
    # The message, its factors in float32 and the reply.
    target = 2.0 + 4.0 / DTYPES[wire_dtype].itemsize
    return [
        _row("ClientApp, beyond message and reply", CLIENT_TARGET, ours["extra"], ours, "seconds"),
        _row("trainer, beyond its base", target, theirs["peak"], ours, "seconds"),
        _row("ClientApp, answered from disk", CLIENT_TARGET, ours["again"], ours, "again_seconds"),
    ]


def _row(
    name: str, target: float, grown: float, found: Mapping[str, float], seconds: str
) -> AdapterRow:
    return AdapterRow(
        name=name,
        ratio=grown / found["bytes"],
        target=target,
        error=found["different"],
        megabytes=grown / 1e6,
        message_megabytes=found["bytes"] / 1e6,
        seconds=found[seconds],
    )


def shapes(model: str) -> dict[str, tuple[int, int]]:
    """``[out, in]`` of every linear; a part of a known model's name is enough if it is one's own.

    Raises:
        UserError: a model that is not known.
    """
    known = [name for name in CLOCK_MODELS if model.lower() in name.lower()]
    shape = clock_shape(known[0] if len(known) == 1 else model)
    return {
        f"model.layers.{layer}.{linear.name}": (linear.out_features, linear.in_features)
        for layer in range(shape.num_layers)
        for linear in shape.linears
    }


def random_adapter(model: str, rank: int) -> Adapter:
    """Random factors of every linear of a model."""
    draw = generator(0, "adapter", model)
    return Adapter(
        {
            name: LoRAFactors(
                lora_A=torch.randn(min(rank, out, inner), inner, generator=draw),
                lora_B=torch.randn(out, min(rank, out, inner), generator=draw),
                alpha=16.0,
            )
            for name, (out, inner) in shapes(model).items()
        }
    )


class _EchoTrainer(ResidentTrainer):
    """A resident trainer that hands back the factors it is to train."""

    def _worker(self, config: Config, client_id: str) -> Worker:
        return cast(Worker, _Echo(super()._worker(config, client_id)))


class _Echo:
    """A worker but for its training."""

    def __init__(self, worker: Worker) -> None:
        self._own = worker

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def train(self, jobs: Sequence[TrainJob]) -> list[TrainResult]:
        return [
            TrainResult(
                client_id=job.client_id,
                rank_class=job.start.rank_class.name,
                base_round=job.start.base_round,
                digest=job.start.digest,
                num_examples=1,
                adapter=job.start.trained,
                steps=1,
                train_loss=1.0,
                loss_before=1.0,
                loss_after=1.0,
            )
            for job in jobs
        ]


def serve(folder: Path, data: Path) -> None:
    """A trainer on ``folder/socket`` until standard input ends; then what its peak grew by."""
    node = OwnerConfig.of(model="embedded", data=str(data), sets=("engine.threads=1",))
    kept = ReplyStore(folder / "kept", max_bytes=8 * GIBIBYTE, max_seconds=3600.0)
    trainer = _EchoTrainer(owner=node, replies=kept)
    service = TrainerService(trainer, limits=Limits(request_bytes=8 * GIBIBYTE))
    server = listen(service, folder / "socket")
    server.start()
    baseline = settled_bytes()
    reset_peak()
    print("ready", flush=True)
    sys.stdin.read()
    print(json.dumps({"peak": peak_bytes() - baseline}), flush=True)
    stop(service, server, folder / "socket", 10.0)


def ask_twice(folder: Path, model: str, rank: int, wire_dtype: str) -> dict[str, float]:
    """One train message and the same again: seconds, bytes, growth beyond message and reply."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN, 0
    message = _message(model, rank, wire_dtype)
    context = Context(
        run_id=RUN,
        node_id=NODE,
        node_config={"client-id": "site"},
        state=RecordDict(),
        run_config=Config.of({"wire.dtype": wire_dtype}).flat(),
    )
    found: dict[str, float] = {"bytes": content_bytes(message.content)}
    for grown, seconds in (("extra", "seconds"), ("again", "again_seconds")):
        baseline = settled_bytes()
        reset_peak()
        began = time.perf_counter()
        reply = ask(folder / "socket", message, context)
        found[seconds] = time.perf_counter() - began
        found[grown] = peak_bytes() - baseline - content_bytes(reply)
        found["different"] = float(_factors(message.content) != _factors(reply))
        del reply
    return found


def _factors(content: RecordDict) -> bytes:
    """The bytes of the factors in a job or a reply."""
    if PACKED in content:
        return content.array_records[PACKED][PACKED].data
    inline = (record.get(DATA) for record in content.config_records.values())
    return next(data for data in inline if isinstance(data, bytes))


def _message(model: str, rank: int, wire_dtype: str) -> Message:
    adapter = random_adapter(model, rank)
    rank_class = RankClass(name=f"rank_{rank}", rank=rank)
    start = Start(rank_class=rank_class, base_round=0, trained=adapter)
    payloads = {"trained": pack(adapter, wire_dtype)}
    content = encode_train_job(start, payloads, server_round=1, num_server_rounds=1)
    return Message(content, dst_node_id=NODE, message_type=MessageType.TRAIN)


def main(arguments: Sequence[str] | None = None) -> None:
    """One of the two processes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("role", choices=("serve", "ask"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--wire-dtype", default="bfloat16")
    options = parser.parse_args(arguments)
    if options.role == "serve":
        serve(options.folder, options.data)
    else:
        found = ask_twice(options.folder, options.model, options.rank, options.wire_dtype)
        print(json.dumps(found))


if __name__ == "__main__":
    main()
