"""Loads the base and the clients' rows once, trains and evaluates jobs with them.

A ClientApp and a simulation's cohort call the same ``train(jobs) -> results``; only the number of
jobs differs. Simulated clients may use different quantizations (``clients.quantization``): the
worker loads one base of each in use, and a pass trains clients of one quantization only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

import flexlora
from flexlora.clients.passes import TrainPasses, failed_training
from flexlora.config.cores import allowed_cores
from flexlora.config.resolve import Config
from flexlora.config.sections import Privacy
from flexlora.data.caps import capped_rows
from flexlora.data.clients import ClientData, client_rows
from flexlora.data.collation import Example
from flexlora.data.held_out import held_out_names, without_held_out
from flexlora.data.poisoning import poisoned_rows
from flexlora.data.row_bound import RowBound, bounded_rows
from flexlora.errors import UserError, nearest, one_line
from flexlora.evaluation.evaluate import evaluate
from flexlora.evaluation.padding import takes_padding
from flexlora.planning.probing import device_name, free_bytes, probe, require, require_optimizer
from flexlora.planning.shares import deal_quantizations, parse_quantization_shares
from flexlora.runs.sources import Sources
from flexlora.seeds import derive_seed
from flexlora.training.local import TrainSettings, train
from flexlora.training.models import BaseModel, load_base, pick_device
from flexlora.training.out_of_memory import within_memory
from flexlora.training.personal import PersonalPlan, personalised
from flexlora.training.slots import SlotModel, slot_model
from flexlora.wire.jobs import Capability, EvalJob, EvalResult, TrainJob, TrainResult
from flexlora.wire.packing import WIRE_VERSION

__all__ = ["Worker", "failed_training", "worker_for"]

ALL_ROWS = RowBound()
_workers: dict[tuple[Config, RowBound], Worker] = {}


def worker_for(config: Config, bound: RowBound = ALL_ROWS) -> Worker:
    """This process's worker for ``config`` and the rows in ``bound``, made at the first call."""
    key = config, bound
    if key not in _workers:
        _workers.clear()  # one configuration at a time
        _workers[key] = Worker(config, bound)
    return _workers[key]


class Worker:
    """The base model, the clients' rows and the settings of one configuration.

    Raises:
        UserError: a model or data that cannot be loaded, a model that cannot be trained by rows or
            cannot generate, target modules that match nothing, a quantization that this machine
            cannot run.
    """

    def __init__(self, config: Config, bound: RowBound = ALL_ROWS) -> None:
        self.config = config
        self._interrupt: Callable[[], str] | None = None
        torch.set_num_threads(
            config.engine.threads or min(torch.get_num_threads(), allowed_cores())
        )
        rows = client_rows(
            path=config.data.path,
            name=config.data.name,
            kind=config.data.partition,
            num_clients=config.clients.count,
            dirichlet_alpha=config.data.dirichlet_alpha,
            seed=config.seed,
            tasks=config.data.tasks,
        )
        self.rows = bounded_rows(rows, bound)  # with those that are held out from training
        rows = without_held_out(
            self.rows, config.data.held_out_tasks, config.clients.held_out, seed=config.seed
        )
        rows = capped_rows(rows, config.population.examples, seed=config.seed)
        rows = poisoned_rows(rows, config.population.hostile, seed=config.seed)
        device = pick_device(config.engine.device)
        wide = torch.float64 if config.wire.dtype == "float64" else torch.float32
        require_optimizer(config.train.optim, device, dtype=wide)
        self.free_bytes = free_bytes(device)  # before the base is loaded
        self.quantizations = deal_quantizations(
            list(rows),
            shares=config.clients.quantization,
            default=config.model.quantization,
            seed=config.seed,
        )
        self.bases = self._load_bases(device)
        # All have the same tokenizer, module names and shapes.
        self.base: BaseModel = next(iter(self.bases.values()))
        longest = self.base.max_positions
        self.data = ClientData(
            rows,
            tokenizer=self.base.tokenizer,
            template=config.data.template,
            max_length=min(config.train.max_length, longest or config.train.max_length),
            date=config.data.template_date,
            vocabulary=self.base.vocab_size,
        )
        private = config.privacy if config.privacy.mode == "example" else Privacy()
        self.settings = TrainSettings(
            **dict(config.train),
            seed=config.seed,
            lora_dropout=config.lora.dropout,
            row_clip=private.clip,
            row_noise=private.noise_multiplier,
            reproducible=private.reproducible,
        )
        self.personal: PersonalPlan | None = None
        if config.personal.rank:
            self.personal = PersonalPlan(
                **dict(config.personal),
                alpha=config.lora.alpha,
                rslora=config.lora.rslora,
                seed=derive_seed(config.seed, "personal"),
            )
        self._global_passes, self._personal_passes = TrainPasses(), TrainPasses()
        self.shapes = self.slots.shapes  # raises for targets that match nothing
        if config.eval.generate != "never":
            takes_padding(self.slots)  # raises for models that cannot generate

    def _load_bases(self, device: torch.device) -> dict[str, BaseModel]:
        """A base of every quantization in use, ``model.quantization`` first."""
        config, used = self.config, set(self.quantizations.values())
        bases = {}
        for kind in sorted(used, key=lambda kind: (kind != config.model.quantization, kind)):
            named = kind in parse_quantization_shares(config.clients.quantization)
            require(kind, device, key="clients.quantization" if named else "model.quantization")
            bases[kind] = load_base(
                config.model.name,
                dtype=config.model.dtype,
                quantization=kind,
                outlier_threshold=config.model.outlier_threshold,
                attention=config.model.attn_implementation,
                device=config.engine.device,
            )
        return bases

    def limit_rows(self, client_id: str, rows: int) -> None:
        """Train this client with at most so many rows in a pass; its gradients are the same."""
        for passes in (self._global_passes, self._personal_passes):
            passes.rows_in_pass[client_id] = min(rows, passes.rows_in_pass.get(client_id, rows))

    @contextmanager
    def interrupted_by(self, interrupt: Callable[[], str] | None) -> Iterator[None]:
        """Ask ``interrupt`` before every pass inside the block: a reason ends what is under way."""
        self._interrupt = interrupt
        try:
            yield
        finally:
            self._interrupt = None

    def sources(self) -> Sources:
        """The base and the rows, to compare with those of another day."""
        tokens, rows = self.data.tokens_digest(), self.data.digests()
        return Sources(base=self.base.fingerprint, rows=rows, tokens=tokens)

    @property
    def slots(self) -> SlotModel:
        """The first base with its LoRA layers, injected again if another worker replaced them."""
        return self.slots_of(next(iter(self.bases)))

    def slots_of(self, kind: str) -> SlotModel:
        """The base of this quantization with its LoRA layers."""
        return slot_model(self.bases[kind].model, self.config.lora.target_modules)

    def quantization_of(self, client_id: str) -> str:
        """The quantization of this client's base."""
        return self.quantizations.get(client_id, self.config.model.quantization)

    def pass_key(self, client_id: str) -> str:
        """Clients with equal keys may share a pass.

        8-bit with an outlier threshold chooses outlier columns over the whole batch, so that
        clients would affect each other: each gets a key of its own.
        """
        kind = self.quantization_of(client_id)
        alone = kind == "8bit" and self.config.model.outlier_threshold > 0
        return f"{kind}/{client_id}" if alone else kind

    @property
    def client_ids(self) -> list[str]:
        return self.data.client_ids

    def client_at(self, partition_id: int) -> str | None:
        """The client of a Flower partition, None where there are more nodes than clients."""
        ids = self.client_ids
        return ids[partition_id] if partition_id < len(ids) else None

    def capability(self, client_id: str, *, probed: bool = True) -> Capability:
        """The client's rows, base, device and kernels; ``cause`` says why it cannot train.

        ``probed`` runs the device's kernels, which takes a second and imports bitsandbytes.
        """
        shapes = self.slots.shapes
        kernels = probe(self.base.device) if probed else None
        count = self.data.count(client_id, "train")
        cause = ""
        if not count.examples:
            why = "it holds none"
            if count.dropped:
                why = f"all {count.dropped} are too long for train.max-length"
            elif self.rows.get(client_id, {}).get("train"):
                why = "they are held out"
            cause = f"no train rows: {why}"
        return Capability(
            client_id=client_id,
            num_examples=count.examples,
            num_dropped=count.dropped,
            version=flexlora.__version__,
            wire_version=WIRE_VERSION,
            fingerprint=self.base.fingerprint,
            quantization=self.quantization_of(client_id),
            device=device_name(self.base.device),
            runs=kernels.runs if kernels else (),
            absent=kernels.absent if kernels else (),
            free_bytes=self.free_bytes,
            modules=tuple(shapes),
            out_features=tuple(out for out, _ in shapes.values()),
            in_features=tuple(features for _, features in shapes.values()),
            fan_in_fan_out=self.slots.fan_in_fan_out,
            coverage=self.slots.targets.note,
            cause=cause,
        )

    def train(self, jobs: Sequence[TrainJob]) -> list[TrainResult]:
        """Results in the order of ``jobs``; a failed job fails no other.

        With ``personal.rank`` each result also has the client's personal factors; the adapter to
        send is the same with and without them.
        """
        results = self._train_all(jobs, self.settings, self._global_passes)
        if self.personal is None:
            return results

        def train_personal(
            personal_jobs: Sequence[TrainJob], settings: TrainSettings
        ) -> list[TrainResult]:
            return self._train_all(personal_jobs, settings, self._personal_passes)

        return personalised(self.personal, jobs, results, self.settings, train_personal)

    def _train_all(
        self, jobs: Sequence[TrainJob], settings: TrainSettings, passes: TrainPasses
    ) -> list[TrainResult]:
        ready = [k for k, job in enumerate(jobs) if self.train_rows(job)]
        results = {
            k: failed_training(job, "no train rows") for k, job in enumerate(jobs) if k not in ready
        }
        for members in self._passes([jobs[k].client_id for k in ready]):
            chosen = [ready[k] for k in members]
            done = passes.train([jobs[k] for k in chosen], settings, self._train)
            results |= dict(zip(chosen, done, strict=True))
        return [results[k] for k in range(len(jobs))]

    def _passes(self, client_ids: Sequence[str]) -> list[list[int]]:
        """Indices of the clients of each pass, in the order of their first."""
        groups: dict[str, list[int]] = {}
        for k, client_id in enumerate(client_ids):
            groups.setdefault(self.pass_key(client_id), []).append(k)
        return list(groups.values())

    def train_rows(self, job: TrainJob) -> list[Example]:
        """The train rows of the job's client."""
        return self.data.examples(job.client_id, "train")

    def _train(self, jobs: Sequence[TrainJob], settings: TrainSettings) -> list[TrainResult]:
        return train(
            self.slots_of(self.quantization_of(jobs[0].client_id)),
            jobs,
            [self.train_rows(job) for job in jobs],
            settings,
            pad_token_id=self.base.pad_token_id,
            interrupt=self._interrupt,
        )

    def evaluate(self, jobs: Sequence[EvalJob]) -> list[EvalResult]:
        """Scores of each job's adapters on its client's held-out rows, or the cause of failure."""
        results: dict[int, EvalResult] = {}
        for members in self._passes([job.client_id for job in jobs]):
            done = self._evaluate_together([jobs[k] for k in members])
            results |= dict(zip(members, done, strict=True))
        return [results[k] for k in range(len(jobs))]

    def _evaluate_together(self, jobs: Sequence[EvalJob]) -> list[EvalResult]:
        kind = self.quantization_of(jobs[0].client_id)

        def attempt(size: int) -> list[EvalResult]:
            return evaluate(
                self.slots_of(kind),
                self.bases[kind],
                jobs,
                [self.held_out(job.client_id, job.held_out_tasks) for job in jobs],
                batch_size=size,
                max_new_tokens=self.config.eval.max_new_tokens,
                interrupt=self._interrupt,
            )

        try:
            results, _ = within_memory(attempt, self.config.eval.batch_size)
        except Exception as error:
            if len(jobs) == 1:
                return [self._evaluate_without_personal(jobs[0], one_line(error))]
            return [self._evaluate_together([job])[0] for job in jobs]
        if results is None:
            cause = "out of memory with 1 row in an evaluation pass"
            return [EvalResult(client_id=job.client_id, cause=cause) for job in jobs]
        return results

    def _evaluate_without_personal(self, job: EvalJob, cause: str) -> EvalResult:
        """Evaluate once more without the personal factors, and keep the cause in the result."""
        if job.personal is None:
            return EvalResult(client_id=job.client_id, cause=cause)
        (result,) = self._evaluate_together([replace(job, personal=None)])
        return replace(result, cause=result.cause or f"personal factors: {cause}")

    def held_out(self, client_id: str, held_out_tasks: bool = False) -> list[Example]:
        """The rows a client is evaluated on: the first ``eval.max-examples`` of ``eval.split``.

        Those of ``data.held-out-tasks`` are among them only if asked for.
        """
        if client_id not in self.client_ids:
            hint = nearest(client_id, self.client_ids)
            raise UserError(f"client '{client_id}' is not in the data.{hint}")
        rows = self.data.examples(client_id, self.config.eval.split)
        names = frozenset() if held_out_tasks else held_out_names(self.config.data.held_out_tasks)
        if names:
            rows = [row for row in rows if row.task not in names and row.category not in names]
        return rows[: self.config.eval.max_examples or None]
