"""Personal factors: trained by each client over the global model it receives, never uploaded.

    round:    global training first, unchanged; then, with T_c(G) frozen,
              client k takes some steps on  min over (A_k, B_k) of  L_k(W + T_c(G) + s B_k A_k)
    at use:   W + T_c(G) + s B_k A_k  for client k

A shared and a local adapter side by side are FedDPA's (Yang et al., NeurIPS 2024, arXiv
2403.19211), here as a plain sum without its weights by instance. As in Ditto (Li et al.,
ICML 2021, arXiv 2012.04221) the personal model does not change the global one and continues from
round to round; it is regularised by its rank, not by a proximal term.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import replace

from flexlora.aggregation.engine.starts import LocalPlan, Start
from flexlora.algebra.linalg import live_rows
from flexlora.config.sections import Personal
from flexlora.lora.adapters import Adapter, LoRAFactors
from flexlora.lora.ranks import RankClass
from flexlora.seeds import generator
from flexlora.training.personal_store import PersonalStore
from flexlora.training.schedule import TrainSettings
from flexlora.training.uplink import add_note
from flexlora.wire.jobs import PERSONAL, TrainJob, TrainResult

__all__ = ["Frozen", "PersonalPlan", "PersonalStore", "frozen_model", "personalised"]

Frozen = MutableMapping[tuple[int, int], tuple[Adapter | None, str]]


class PersonalPlan(Personal):
    """The section ``personal``, LoRA's scaling, and the seed of personal training."""

    alpha: float
    rslora: bool = False
    seed: int = 0

    def settings(self, settings: TrainSettings) -> TrainSettings:
        """``settings`` with this plan's steps, rate and seed, and plain AdamW."""
        plan = {"max_steps": self.max_steps, "learning_rate": self.learning_rate, "seed": self.seed}
        return settings.model_copy(update={**plan, "optim": "adamw_torch", "proximal_mu": 0.0})

    def job(self, job: TrainJob, frozen: Frozen | None = None) -> TrainJob:
        """A second job for the client: its personal factors over the frozen model of the first.

        Training continues from stored factors or starts from random ``lora_A`` and zero ``lora_B``.
        Clients of a cohort with the same payload share one model through ``frozen``.

        Raises:
            ValueError: stored factors of another rank, alpha, dtype or target list.
        """
        start, models = job.start, {} if frozen is None else frozen
        payload = (id(start.trained), id(start.carried))
        if payload not in models:
            models[payload] = frozen_model(start)
        carried, dtype = models[payload]
        personal = Start(
            rank_class=RankClass(name=PERSONAL, rank=self.rank),
            base_round=start.base_round,
            trained=self._initial_factors(job),
            carried=carried,
            carried_dtype=dtype,
            local=LocalPlan(merge=start.local.merge),
        )
        return replace(job, start=personal, personal=None)

    def _initial_factors(self, job: TrainJob) -> Adapter:
        """The stored factors of the job, or fresh ones."""
        fresh = Adapter(
            {name: self._fresh(job.client_id, name, f) for name, f in job.start.trained.items()}
        )
        if job.personal is None:
            return fresh
        for name in sorted(set(fresh) | set(job.personal)):
            stored, wanted = job.personal.get(name), fresh.get(name)
            if stored is None or wanted is None or not _same_form(stored, wanted):
                raise ValueError(
                    f"client {job.client_id}, module '{name}': the stored personal factors "
                    f"are {_describe(stored)}, expected {_describe(wanted)}; "
                    "were they made with another personal.rank, LoRA alpha or target list?"
                )
        return job.personal

    def _fresh(self, client_id: str, module: str, sent: LoRAFactors) -> LoRAFactors:
        """Random ``lora_A`` and zero ``lora_B`` at the plan's rank, capped by the module."""
        out_features, in_features = sent.out_features, sent.in_features
        rank = min(self.rank, out_features, in_features)
        rows = live_rows(rank, in_features, generator(self.seed, "live", client_id, module))
        return LoRAFactors(
            lora_A=rows.to(sent.lora_A),
            lora_B=sent.lora_B.new_zeros(out_features, rank),
            alpha=self.alpha,
            rslora=self.rslora,
        )


def personalised(
    plan: PersonalPlan,
    jobs: Sequence[TrainJob],
    results: Sequence[TrainResult],
    settings: TrainSettings,
    train: Callable[[Sequence[TrainJob], TrainSettings], Sequence[TrainResult]],
) -> list[TrainResult]:
    """``results`` with personal factors, trained by all clients in one call of ``train``.

    The result of a client that cannot train them gets a note with the cause.
    """
    frozen: Frozen = {}
    personal_jobs: dict[int, TrainJob] = {}
    personal = list(results)
    for k, (job, result) in enumerate(zip(jobs, results, strict=True)):
        if result.adapter is None:
            continue  # global training failed
        try:
            personal_jobs[k] = plan.job(job, frozen)
        except ValueError as error:
            personal[k] = add_note(result, f"personal factors: {error}")
    jobs_in_order = list(personal_jobs.values())
    done = train(jobs_in_order, plan.settings(settings)) if jobs_in_order else []
    for k, trained in zip(personal_jobs, done, strict=True):
        # Personal ranks are fixed: drop the request for a lower one.
        cause = trained.cause.removesuffix(f"; asks for rank {trained.asked_rank}") or trained.note
        fewest = min(filter(None, (results[k].too_many, trained.too_many)), default=0)
        result = replace(results[k], personal=trained.adapter, too_many=fewest)
        personal[k] = add_note(result, f"personal factors: {cause}" if cause else "")
    return personal


def frozen_model(start: Start) -> tuple[Adapter | None, str]:
    """The change that a client was sent, as frozen factors, and their dtype; None if zero."""
    served = start.served()
    if not any(bool(factors.lora_B.any()) for factors in served.values()):
        return None, ""
    return served, start.carried_dtype if served is start.carried else ""


def _same_form(one: LoRAFactors, other: LoRAFactors) -> bool:
    return all(
        getattr(one, label).shape == getattr(other, label).shape
        and getattr(one, label).dtype == getattr(other, label).dtype
        for label in ("lora_A", "lora_B")
    ) and (one.alpha, one.rslora) == (other.alpha, other.rslora)


def _describe(factors: LoRAFactors | None) -> str:
    if factors is None:
        return "absent"
    size = f"{factors.out_features} x {factors.in_features}"
    kind = str(factors.lora_A.dtype).removeprefix("torch.")
    return f"of rank {factors.rank} for {size}, alpha {factors.alpha:g}, {kind}"
