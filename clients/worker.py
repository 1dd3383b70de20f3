"""Who does the work behind a ClientApp: holds the base and the data, answers jobs.

One worker per process and configuration. In a ClientApp's process and in a simulation's cohort
it is the same ``train(jobs) -> results``; only the number of jobs differs.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import replace

import torch

import flexlora
from flexlora.config import Config
from flexlora.data.clients import ClientData, client_rows
from flexlora.data.collation import Example
from flexlora.errors import UserError, nearest, told
from flexlora.evaluation import evaluate
from flexlora.jobs import Capability, EvalJob, EvalResult, TrainJob, TrainResult
from flexlora.models import BaseModel, load_base
from flexlora.slots import SlotModel, slot_model
from flexlora.training import TrainSettings, train

__all__ = ["Worker", "train_settings", "worker_for"]

_workers: dict[tuple, Worker] = {}


def worker_for(config: Config) -> Worker:
    """The worker of this process for ``config``: base and data are loaded once."""
    key = tuple(config.items())
    if key not in _workers:
        _workers.clear()  # one configuration at a time: another one's data need not stay
        _workers[key] = Worker(config)
    return _workers[key]


def train_settings(config: Config) -> TrainSettings:
    """The ``train.*`` keys as plain values."""
    names = (
        "learning-rate",
        "per-device-train-batch-size",
        "gradient-accumulation-steps",
        "max-steps",
        "num-train-epochs",
        "optim",
        "weight-decay",
        "adam-epsilon",
        "proximal-mu",
        "max-grad-norm",
        "lr-scheduler-type",
        "gradient-checkpointing",
    )
    return TrainSettings(
        lora_dropout=config["lora.dropout"],
        seed=config["seed"],
        **{name.replace("-", "_"): config[f"train.{name}"] for name in names},
    )


class Worker:
    """The base model, the clients' rows and the settings of one configuration.

    Raises:
        UserError: a model or data that cannot be loaded, targets that match nothing.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        torch.set_num_threads(config["engine.threads"] or torch.get_num_threads())
        rows = client_rows(
            path=config["data.path"],
            name=config["data.name"],
            kind=config["data.partition"],
            num_clients=config["clients.count"],
            dirichlet_alpha=config["data.dirichlet-alpha"],
            seed=config["seed"],
            tasks=config["data.tasks"],
        )
        self.base: BaseModel = load_base(
            config["model.name"],
            dtype=config["model.dtype"],
            quantization=config["model.quantization"],
            device=config["engine.device"],
        )
        longest = self.base.max_positions
        self.data = ClientData(
            rows,
            tokenizer=self.base.tokenizer,
            template=config["data.template"],
            max_length=min(config["train.max-length"], longest or config["train.max-length"]),
        )
        self.settings = train_settings(config)
        self.shapes = self.slots.shapes  # targets that match nothing are told before any work

    @property
    def slots(self) -> SlotModel:
        """The base with its LoRA layers, injected anew if another configuration came between."""
        return slot_model(self.base.model, self.config["lora.target-modules"])

    @property
    def client_ids(self) -> list[str]:
        return self.data.client_ids

    def client_at(self, partition_id: int) -> str | None:
        """The client of a Flower partition, None where there are more nodes than clients."""
        ids = self.client_ids
        return ids[partition_id] if partition_id < len(ids) else None

    def capability(self, client_id: str) -> Capability:
        """What this client can say of itself; a client without rows says so in ``cause``."""
        shapes = self.slots.shapes
        examples = self.data.examples(client_id, "train")
        dropped = self.data.num_dropped(client_id, "train")
        cause = ""
        if not examples:
            why = f"all {dropped} are too long for train.max-length" if dropped else "it holds none"
            cause = f"no train rows: {why}"
        return Capability(
            client_id=client_id,
            num_examples=len(examples),
            num_dropped=dropped,
            version=flexlora.__version__,
            fingerprint=self.base.fingerprint,
            quantization=self.config["model.quantization"],
            device=f"{self.base.device.type} ({platform.machine()})",
            modules=tuple(shapes),
            out_features=tuple(out for out, _ in shapes.values()),
            in_features=tuple(features for _, features in shapes.values()),
            fan_in_fan_out=self.slots.fan_in_fan_out,
            cause=cause,
        )

    def train(self, jobs: Sequence[TrainJob]) -> list[TrainResult]:
        """Results in the order of ``jobs``; a job that fails takes no other with it."""
        ready = [k for k, job in enumerate(jobs) if self._train_rows(job)]
        results = {
            k: failed_training(job, "no train rows") for k, job in enumerate(jobs) if k not in ready
        }
        if ready:
            done = self._train_together([jobs[k] for k in ready])
            results |= dict(zip(ready, done, strict=True))
        return [results[k] for k in range(len(jobs))]

    def _train_rows(self, job: TrainJob) -> list[Example]:
        return self.data.examples(job.client_id, "train")

    def _train_together(self, jobs: Sequence[TrainJob]) -> list[TrainResult]:
        try:
            return train(
                self.slots,
                jobs,
                [self._train_rows(job) for job in jobs],
                self.settings,
                pad_token_id=self.base.pad_token_id,
            )
        except Exception as error:
            if len(jobs) == 1:
                return [failed_training(jobs[0], told(error))]
            # Alone, each tells whether it was the cause; the others lose only time.
            return [self._train_together([job])[0] for job in jobs]

    def evaluate(self, jobs: Sequence[EvalJob]) -> list[EvalResult]:
        """Scores of each job's adapters on its client's held-out rows, or the cause of none."""
        try:
            return evaluate(
                self.slots,
                self.base,
                jobs,
                [self.held_out(job.client_id) for job in jobs],
                batch_size=self.config["eval.batch-size"],
                max_new_tokens=self.config["eval.max-new-tokens"],
            )
        except Exception as error:
            if len(jobs) == 1:
                return [EvalResult(client_id=jobs[0].client_id, cause=told(error))]
            return [self.evaluate([job])[0] for job in jobs]

    def held_out(self, client_id: str) -> list[Example]:
        """The rows a client is evaluated on: the first ``eval.max-examples`` of ``eval.split``."""
        if client_id not in self.client_ids:
            hint = nearest(client_id, self.client_ids)
            raise UserError(f"client '{client_id}' is not in the data.{hint}")
        rows = self.data.examples(client_id, self.config["eval.split"])
        return rows[: self.config["eval.max-examples"] or None]


def failed_training(job: TrainJob, cause: str) -> TrainResult:
    """A result without factors: who, what it was to start from, and why there is nothing."""
    return replace(
        TrainResult(
            client_id=job.client_id,
            rank_class=job.start.rank_class.name,
            base_round=job.start.base_round,
            digest=job.start.digest,
        ),
        cause=cause,
    )
