"""Local training of K slots at once: the same code for a device (K = 1) and for a cohort.

Each slot minimises the mean loss over its answer tokens. Slots share forward and backward passes
only: losses are summed over slots, gradients are clipped per slot, and each slot has its batches,
learning rate, dropout masks and number of steps. So K slots equal K separate runs up to the
rounding of wider matrix products. With ``row_clip`` a step is one of DP-SGD (``row_privacy.py``),
and no loss is measured, since none may leave.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flexlora.data.collation import Batch, Example, collate
from flexlora.errors import UserError
from flexlora.lora.adapters import Adapter
from flexlora.seeds import derive_seed
from flexlora.training.layers import DropoutStream
from flexlora.training.optim import SlotOptimizer, clip_rows
from flexlora.training.row_privacy import RowPrivacy
from flexlora.training.schedule import TrainSettings, learning_rate_at, num_steps, planned_rows
from flexlora.training.slots import SlotModel, kept_rank
from flexlora.wire.jobs import TrainJob, TrainResult

__all__ = [
    "TrainSettings",
    "answer_logits",
    "answer_losses",
    "learning_rate_at",
    "logits_at",
    "num_steps",
    "row_losses",
    "train",
]


def train(
    slots: SlotModel,
    jobs: Sequence[TrainJob],
    examples: Sequence[Sequence[Example]],
    settings: TrainSettings,
    *,
    pad_token_id: int = 0,
    interrupt: Callable[[], str] | None = None,
) -> list[TrainResult]:
    """Train ``jobs[k]`` on ``examples[k]``, all in the same passes; results in the order of jobs.

    Args:
        interrupt: asked before every pass; a reason ends the training, and no step counts.

    Raises:
        ValueError: no jobs, a job without examples, or jobs that train different factors.
        UserError: ``interrupt`` gave a reason, or rows cannot be clipped one by one here.
    """
    if not jobs or not all(examples):
        raise ValueError("every job needs at least one example; skip clients without rows.")
    if len({(job.start.trainable, job.start.local) for job in jobs}) > 1:
        raise ValueError("jobs of one cohort must train alike; plan them apart.")
    started = time.perf_counter()
    steps = [num_steps(len(rows), settings) for rows in examples]
    # Slots end from the last to the first, so that those still training are always a prefix.
    order = sorted(range(len(jobs)), key=lambda k: (-steps[k], jobs[k].client_id))
    cohort = _Cohort(
        slots=slots,
        jobs=[jobs[k] for k in order],
        examples=[examples[k] for k in order],
        steps=[steps[k] for k in order],
        settings=settings,
        pad_token_id=pad_token_id,
        interrupt=interrupt,
    )
    try:
        by_slot = cohort.run()
    finally:
        slots.clear()
    seconds = (time.perf_counter() - started) / len(jobs)
    results = {
        k: TrainResult(**by_slot[slot], train_seconds=seconds) for slot, k in enumerate(order)
    }
    return [results[k] for k in range(len(jobs))]


@dataclass(kw_only=True)
class _Cohort:
    slots: SlotModel
    jobs: list[TrainJob]
    examples: list[Sequence[Example]]
    steps: list[int]
    settings: TrainSettings
    pad_token_id: int
    interrupt: Callable[[], str] | None = None
    done: int = 0  # steps

    def run(self) -> list[dict]:
        starts = [job.start.for_client(job.client_id) for job in self.jobs]
        self.local = starts[0].local
        self.slots.load(
            [start.trained for start in starts],
            carried=[start.carried for start in starts],
            carried_dtype=torch.bfloat16 if starts[0].carried_dtype == "bfloat16" else None,
            trainable=starts[0].trainable,
            merge=self.local.merge,
        )
        self.optimizer = SlotOptimizer(
            self.slots.parameters,
            optim=self.settings.optim,
            weight_decay=self.settings.weight_decay,
            adam_epsilon=self.settings.adam_epsilon,
            live=self.slots.live_numbers,
        )
        self.privacy = self._row_privacy()
        self.plans = [self._plan(k) for k in range(len(self.jobs))]
        first_rows = [plan[0][: self.settings.per_device_train_batch_size] for plan in self.plans]
        # The first pass of the first step gives the loss before training, unless it has dropout,
        # fewer rows, or an aligned lora_A.
        settings, unknown = self.settings, [math.nan] * len(self.jobs)
        halved = settings.rows_per_pass != settings.per_device_train_batch_size
        separate = settings.lora_dropout > 0 or halved or self.local.gradient_batches > 0
        before = unknown if self.privacy else self._probe(first_rows) if separate else []
        tails = self._tails()
        losses = [0.0] * len(self.jobs)
        tokens = [0] * len(self.jobs)
        with checkpointing(self.slots.model, self.settings.gradient_checkpointing):
            self._align()
            self.origin = self.slots.parameters.clone() if self.settings.proximal_mu else None
            for step in range(self.steps[0]):
                active = sum(count > step for count in self.steps)
                accumulate = self._accumulate_private if self.privacy else self._accumulate
                with self.slots.first_slots(active):
                    step_losses, step_tokens = accumulate(step, active)
                self._pull(active)
                clip_rows(self.slots.gradients[:active], self.settings.max_grad_norm)
                self.optimizer.step(self.slots.gradients, self._rates(step, active))
                self.done = step + 1
                before = before or self._per_token(self.first_sums, first_rows)
                for k in range(active):
                    losses[k] += step_losses[k] / self.steps[k]
                    tokens[k] += step_tokens[k]
        after = unknown if self.privacy else self._probe(first_rows)
        pruned = [new < old for new, old in zip(self._tails(), tails, strict=True)]
        return [
            self._result(k, losses[k], tokens[k], before[k], after[k], pruned[k])
            for k in range(len(after))
        ]

    def _row_privacy(self) -> RowPrivacy | None:
        """DP-SGD's part of the training, None without a ``row_clip``."""
        if not self.settings.row_clip:
            return None
        counts = [len(rows) for rows in self.examples]
        return RowPrivacy.of(self.settings, self.jobs, counts, self.slots.live_numbers())

    def _go_on(self) -> None:
        """Raise where ``interrupt`` has a reason: before a pass, with the factors as they are."""
        why = self.interrupt() if self.interrupt is not None else ""
        if why:
            raise UserError(
                f"ended after {self.done} of {self.steps[0]} steps, which do not count: {why}"
            )

    def _align(self) -> None:
        """Align ``lora_A`` of every slot with its gradient over its first batches."""
        batches = self.local.gradient_batches
        if batches < 1:
            return
        seed = derive_seed(self.settings.seed, "align", self.jobs[0].server_round, 0)
        with self.slots.sketching(seed):
            for step in range(batches):
                self._accumulate(step, len(self.jobs), dropout=False)

    def _pull(self, active: int) -> None:
        """FedProx (arXiv 1812.06127): the gradient of ``mu / 2 |factors - start|^2``."""
        if self.origin is not None:
            change = self.slots.parameters[:active] - self.origin[:active]
            self.slots.gradients[:active] += self.settings.proximal_mu * change

    @torch.no_grad()
    def _tails(self) -> list[float]:
        """The tail norms that decide about pruning, by slot; 0 without pruning."""
        if not self.local.prune_factor:
            return [0.0] * len(self.jobs)
        return self.slots.tail_norms(self.local.prune_factor).tolist()

    def _result(
        self, k: int, loss: float, tokens: int, before: float, after: float, pruned: bool
    ) -> dict:
        job, finite = self.jobs[k], math.isfinite(loss) and math.isfinite(after)
        if self.privacy:
            finite = bool(torch.isfinite(self.slots.parameters[k]).all())
        adapter = self.slots.extract(k) if finite else None
        if adapter is not None and pruned:
            factor = self.local.prune_factor
            adapter = Adapter(
                {name: f.terms(range(kept_rank(factor, f.rank))) for name, f in adapter.items()}
            )
        return {
            "client_id": job.client_id,
            "rank_class": job.start.rank_class.name,
            "base_round": job.start.base_round,
            "digest": job.start.digest,
            "num_examples": len(self.examples[k]),
            "adapter": adapter,
            "steps": self.steps[k],
            "tokens": tokens,
            "train_loss": loss,
            "loss_before": before,
            "loss_after": after,
            "withheld": self.privacy is not None,
            "cause": "" if finite else "the training loss is not finite; lower the learning rate",
        }

    def _plan(self, k: int) -> list[list[int]]:
        """The rows of every step, and of the batches for aligning."""
        if self.privacy:
            return self.privacy.plan(k, self.steps[k])
        ahead = self.local.gradient_batches
        return planned_rows(self.jobs[k], len(self.examples[k]), self.settings, ahead=ahead)

    def _rates(self, step: int, active: int) -> list[float]:
        return [
            learning_rate_at(self.settings, self.jobs[k], step, self.steps[k])
            for k in range(active)
        ]

    def _accumulate(self, step: int, active: int, *, dropout: bool = True) -> tuple[list, list]:
        """Gradients of one step into the flat buffer; mean losses and answer tokens per slot."""
        size = self.settings.rows_per_pass
        rows = [plan[step] for plan in self.plans[:active]]
        answers = [self._answer_tokens(k, indices) for k, indices in enumerate(rows)]
        self.slots.gradients.zero_()
        losses = [0.0] * active
        for micro in range(math.ceil(max(len(indices) for indices in rows) / size)):
            self._go_on()
            span = slice(micro * size, (micro + 1) * size)
            batch = self._collate([indices[span] for indices in rows])
            if dropout:
                streams = self._streams(batch, step, micro)
                self.slots.set_dropout(self.settings.lora_dropout, streams)
            per_slot = [part.sum() for part in answer_losses(self.slots, batch)]
            means = torch.stack(
                [loss / max(count, 1) for loss, count in zip(per_slot, answers, strict=True)]
            )
            objective = means.sum()
            if dropout and micro == 0 and self.local.prune_penalty:
                objective = objective + self._penalty()
            self.slots.accumulate_gradients(objective)
            if micro == 0:
                self.first_sums = [float(loss.detach()) for loss in per_slot]
            losses = [a + b for a, b in zip(losses, means.tolist(), strict=True)]
        self.slots.set_dropout(0.0, ())
        return losses, answers

    def _accumulate_private(self, step: int, active: int) -> tuple[list, list]:
        """Noisy means of clipped rows into the flat buffer; the losses are not to be known."""
        assert self.privacy is not None
        size, gradients = self.settings.rows_per_pass, self.slots.gradients
        rows = [plan[step] for plan in self.plans[:active]]
        gradients.zero_()
        for at in range(0, max(len(indices) for indices in rows), size):
            self._go_on()
            batch = self._collate([indices[at : at + size] for indices in rows])
            with self.slots.recording_rows(len(batch.input_ids)) as recorded:
                recorded.backward(row_losses(self.slots, batch))
            gradients[:active] += recorded.clipped_sum(self.settings.row_clip, active)
        self.privacy.privatize(gradients, active)
        if self.local.prune_penalty:
            self.slots.accumulate_gradients(self._penalty())  # of the factors alone: no row's
        return [math.nan] * active, [0] * active

    def _penalty(self) -> Tensor:
        """HetLoRA's regulariser of the last terms, over all slots."""
        return self.local.prune_penalty * self.slots.tail_norms(self.local.prune_factor).sum()

    def _answer_tokens(self, k: int, indices: Sequence[int]) -> int:
        return sum(self.examples[k][i].answer_tokens for i in indices)

    def _streams(self, batch: Batch, step: int, micro: int) -> list[DropoutStream | None]:
        if self.settings.lora_dropout == 0.0:
            return []
        streams: list[DropoutStream | None] = []
        for job, rows, length in zip(
            self.jobs, batch.rows_per_slot, batch.lengths_per_slot, strict=False
        ):
            purpose = ("dropout", job.server_round, job.client_id, step, micro)
            seed = derive_seed(self.settings.seed, *purpose)
            stream = DropoutStream(
                seed=seed, rows=rows, length=length, padded_length=batch.input_ids.shape[1]
            )
            streams.append(stream if rows else None)
        return streams

    def _collate(self, indices: Sequence[Sequence[int]]) -> Batch:
        chosen = [[self.examples[k][i] for i in rows] for k, rows in enumerate(indices)]
        return collate(chosen, pad_token_id=self.pad_token_id)

    @torch.no_grad()
    def _probe(self, indices: Sequence[Sequence[int]]) -> list[float]:
        """Mean loss of each slot on the given rows, without dropout."""
        size, sums = self.settings.rows_per_pass, [0.0] * len(indices)
        for at in range(0, max(len(rows) for rows in indices), size):
            self._go_on()
            parts = answer_losses(
                self.slots, self._collate([rows[at : at + size] for rows in indices])
            )
            sums = [a + float(part.sum()) for a, part in zip(sums, parts, strict=True)]
        return self._per_token(sums, indices)

    def _per_token(self, sums: Sequence[float], indices: Sequence[Sequence[int]]) -> list[float]:
        tokens = [self._answer_tokens(k, rows) for k, rows in enumerate(indices)]
        return [total / count for total, count in zip(sums, tokens, strict=True)]


def answer_losses(slots: SlotModel, batch: Batch) -> list[Tensor]:
    """Cross entropy of every answer token, slot by slot: K tensors ``[answer tokens]``."""
    losses, counts = _token_losses(slots, batch)
    return list(losses.split(counts.view(len(batch.rows_per_slot), -1).sum(dim=1).tolist()))


def row_losses(slots: SlotModel, batch: Batch) -> Tensor:
    """The mean cross entropy over the answer tokens of every row, ``[K * b]``; 0 for padding."""
    losses, counts = _token_losses(slots, batch)
    row_of_token = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    sums = losses.new_zeros(len(counts)).index_add(0, row_of_token, losses)
    return sums / counts.clamp(min=1)


def _token_losses(slots: SlotModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross entropy of every answer token in the order of the rows; their counts ``[K * b]``."""
    logits, labels, counts = answer_logits(slots, batch)
    return nn.functional.cross_entropy(logits, labels, reduction="none"), counts


def answer_logits(slots: SlotModel, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Logits ``[n, vocabulary]`` and labels ``[n]`` of all answer tokens, their counts ``[K * b]``.

    Only answer positions go through the output layer where the model takes ``logits_to_keep``,
    unless a target comes after that choice, where the clients' rows are no longer separable.
    Padding is on the right, outside causal attention, so no attention mask is needed and the fast
    causal kernels run. The logits are float32 at least.
    """
    labels = batch.labels.to(slots.device)[:, 1:]
    wanted = labels != -100
    logits = logits_at(slots, batch.input_ids, nn.functional.pad(wanted, (0, 1)))
    return logits, labels[wanted], wanted.sum(dim=1)


def logits_at(slots: SlotModel, input_ids: Tensor, keep: Tensor) -> Tensor:
    """Logits ``[n, vocabulary]`` at the n positions of ``input_ids [K * b, T]`` that are True."""
    keep = keep.to(slots.device)
    options = {} if slots.targets.whole_logits else {"logits_to_keep": keep}
    logits = slots.model(input_ids=input_ids.to(slots.device), use_cache=False, **options).logits
    if logits.dim() == 3:
        logits = logits[keep]
    return logits if logits.dtype == torch.float64 else logits.float()


class checkpointing:  # noqa: N801  (reads as a word at the place of use)
    """Recompute the activations of each decoder layer in the backward pass, inside the block.

    transformers does so only in training mode, which would enable the base's dropout; here the
    layers' ``forward`` is wrapped and they stay in evaluation mode.
    """

    def __init__(self, model: Any, enabled: bool) -> None:
        self.model, self.enabled = model, enabled

    def __enter__(self) -> None:
        from transformers.modeling_layers import GradientCheckpointingLayer

        modules = self.model.modules() if self.enabled else ()
        layers = [m for m in modules if isinstance(m, GradientCheckpointingLayer)]
        if self.enabled and not layers:
            raise ValueError("this model has no decoder layers that can be checkpointed.")
        self.plain = [(layer, vars(layer).get("forward")) for layer in layers]
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

    def __exit__(self, *_: object) -> None:
        for layer, forward in self.plain:
            del layer.forward  # the class's method is visible again
            if forward is not None:
                layer.forward = forward
