"""Who does the work behind a ClientApp: holds the base and the data, answers jobs.

One worker per process and configuration. In a ClientApp's process and in a simulation's cohort
it is the same ``train(jobs) -> results``; only the number of jobs differs. Simulated clients may
stand on different bases (``clients.quantization``): the worker holds one of each kind in use, and
never trains two kinds in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import torch

import flexlora
from flexlora.base_shares import deal_quantizations, parse_base_shares
from flexlora.config import Config
from flexlora.data.clients import ClientData, client_rows
from flexlora.data.collation import Example
from flexlora.errors import UserError, nearest, told
from flexlora.evaluation import evaluate
from flexlora.jobs import Capability, EvalJob, EvalResult, TrainJob, TrainResult
from flexlora.models import BaseModel, load_base, pick_device
from flexlora.out_of_memory import free_memory, train_within_memory, within_memory
from flexlora.probing import device_name, free_bytes, probe, require
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
        UserError: a model or data that cannot be loaded, targets that match nothing, a quantization
            that this machine cannot run.
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
        device = pick_device(config["engine.device"])
        self.free_bytes = free_bytes(device)  # what it is before the base takes its part
        self.quantizations = deal_quantizations(
            list(rows),
            shares=config["clients.quantization"],
            default=config["model.quantization"],
            seed=config["seed"],
        )
        self.bases = self._load_bases(device)
        # Tokenizer, names and shapes are those of any of them.
        self.base: BaseModel = next(iter(self.bases.values()))
        longest = self.base.max_positions
        self.data = ClientData(
            rows,
            tokenizer=self.base.tokenizer,
            template=config["data.template"],
            max_length=min(config["train.max-length"], longest or config["train.max-length"]),
        )
        self.settings = train_settings(config)
        self._rows_per_pass: dict[str, int] = {}  # of clients that ran out of memory
        self.shapes = self.slots.shapes  # targets that match nothing are told before any work

    def _load_bases(self, device: torch.device) -> dict[str, BaseModel]:
        """A base of every kind in use, ``model.quantization`` first."""
        config, used = self.config, set(self.quantizations.values())
        bases = {}
        for kind in sorted(used, key=lambda kind: (kind != config["model.quantization"], kind)):
            named = kind in parse_base_shares(config["clients.quantization"])
            require(kind, device, key="clients.quantization" if named else "model.quantization")
            bases[kind] = load_base(
                config["model.name"],
                dtype=config["model.dtype"],
                quantization=kind,
                outlier_threshold=config["model.outlier-threshold"],
                device=config["engine.device"],
            )
        return bases

    @property
    def slots(self) -> SlotModel:
        """The base with its LoRA layers, injected anew if another configuration came between."""
        return self._slots_of(next(iter(self.bases)))

    def _slots_of(self, kind: str) -> SlotModel:
        return slot_model(self.bases[kind].model, self.config["lora.target-modules"])

    def quantization_of(self, client_id: str) -> str:
        """How this client's base is held: clients of one kind may share a pass."""
        return self.quantizations.get(client_id, self.config["model.quantization"])

    def pass_key(self, client_id: str) -> str:
        """Clients with the same key may be trained and evaluated in one pass.

        With an outlier threshold, 8-bit looks for large inputs over the whole batch, so that
        clients would feel each other: each is alone.
        """
        kind = self.quantization_of(client_id)
        alone = kind == "8bit" and self.config["model.outlier-threshold"] > 0
        return f"{kind}/{client_id}" if alone else kind

    @property
    def client_ids(self) -> list[str]:
        return self.data.client_ids

    def client_at(self, partition_id: int) -> str | None:
        """The client of a Flower partition, None where there are more nodes than clients."""
        ids = self.client_ids
        return ids[partition_id] if partition_id < len(ids) else None

    def capability(self, client_id: str) -> Capability:
        """What this client can say of itself; a client without rows says so in ``cause``."""
        shapes, kernels = self.slots.shapes, probe(self.base.device)
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
            quantization=self.quantization_of(client_id),
            device=device_name(self.base.device),
            runs=kernels.runs,
            absent=kernels.absent,
            free_bytes=self.free_bytes,
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
        for members in self._passes([jobs[k].client_id for k in ready]):
            chosen = [ready[k] for k in members]
            done = self._train_together([jobs[k] for k in chosen])
            results |= dict(zip(chosen, done, strict=True))
        return [results[k] for k in range(len(jobs))]

    def _passes(self, client_ids: Sequence[str]) -> list[list[int]]:
        """Indices of clients that may share a pass, in the order of their first."""
        groups: dict[str, list[int]] = {}
        for k, client_id in enumerate(client_ids):
            groups.setdefault(self.pass_key(client_id), []).append(k)
        return list(groups.values())

    def _train_rows(self, job: TrainJob) -> list[Example]:
        return self.data.examples(job.client_id, "train")

    def _train_together(self, jobs: Sequence[TrainJob]) -> list[TrainResult]:
        """Train clients of one kind in one pass, or one by one where that fails."""
        short = any(job.client_id in self._rows_per_pass for job in jobs)
        if len(jobs) > 1 and not short:
            # Alone, each tells whether it was the cause; the others lose only time.
            with suppress(Exception):
                return self._train(jobs, 0)
            free_memory()
        return [self._train_alone(job) for job in jobs]

    def _train_alone(self, job: TrainJob) -> TrainResult:
        first = self._rows_per_pass.get(job.client_id, self.settings.rows_per_pass)
        try:
            result, rows = train_within_memory(lambda rows: self._train([job], rows)[0], job, first)
        except Exception as error:
            return failed_training(job, told(error))
        if rows < first:
            self._rows_per_pass[job.client_id] = rows  # not to run out again in every round
        return result

    def _train(self, jobs: Sequence[TrainJob], rows_per_pass: int) -> list[TrainResult]:
        return train(
            self._slots_of(self.quantization_of(jobs[0].client_id)),
            jobs,
            [self._train_rows(job) for job in jobs],
            replace(self.settings, micro_batch_size=rows_per_pass),
            pad_token_id=self.base.pad_token_id,
        )

    def evaluate(self, jobs: Sequence[EvalJob]) -> list[EvalResult]:
        """Scores of each job's adapters on its client's held-out rows, or the cause of none."""
        results: dict[int, EvalResult] = {}
        for members in self._passes([job.client_id for job in jobs]):
            done = self._evaluate_together([jobs[k] for k in members])
            results |= dict(zip(members, done, strict=True))
        return [results[k] for k in range(len(jobs))]

    def _evaluate_together(self, jobs: Sequence[EvalJob]) -> list[EvalResult]:
        kind = self.quantization_of(jobs[0].client_id)

        def attempt(size: int) -> list[EvalResult]:
            return evaluate(
                self._slots_of(kind),
                self.bases[kind],
                jobs,
                [self.held_out(job.client_id) for job in jobs],
                batch_size=size,
                max_new_tokens=self.config["eval.max-new-tokens"],
            )

        try:
            results, _ = within_memory(attempt, self.config["eval.batch-size"])
        except Exception as error:
            if len(jobs) == 1:
                return [EvalResult(client_id=jobs[0].client_id, cause=told(error))]
            return [self._evaluate_together([job])[0] for job in jobs]
        if results is None:
            cause = "out of memory with 1 row in an evaluation pass"
            return [EvalResult(client_id=job.client_id, cause=cause) for job in jobs]
        return results

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
