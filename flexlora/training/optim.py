"""AdamW and SGD over the flat buffer of all slots, one row per client.

Rows are independent: each has its step count, learning rate and gradient norm, and a row whose
training has ended does not change. On one row this equals ``torch.optim.AdamW`` (Loshchilov and
Hutter, arXiv 1711.05101) and ``clip_grad_norm_``.

``adamw_8bit`` and ``paged_adamw_8bit`` are bitsandbytes' AdamW with moments in 8 bits: see
``blockwise``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flexlora.errors import UserError, nearest
from flexlora.training.blockwise import BlockwiseMoments, Live

__all__ = ["OPTIMIZERS", "SlotOptimizer", "check_optimizer", "clip_rows"]

OPTIMIZERS = ("adamw_torch", "sgd", "adamw_8bit", "paged_adamw_8bit")


def clip_rows(gradients: Tensor, max_norm: float) -> Tensor:
    """Scale each row of ``[K, P]`` in place to a norm of at most ``max_norm``; norms ``[K]``."""
    norms = torch.linalg.vector_norm(gradients, dim=1)
    if max_norm > 0:
        gradients.mul_((max_norm / (norms + 1e-6)).clamp(max=1.0)[:, None])
    return norms


def check_optimizer(optim: str, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse an optimizer that cannot step factors of ``dtype`` on ``device``.

    Raises:
        ValueError: a name that is not known.
        UserError: paged moments without CUDA, moments in 8 bits of factors in 64.
    """
    if optim not in OPTIMIZERS:
        hint = nearest(optim, OPTIMIZERS)
        raise ValueError(f"optim is '{optim}', expected one of {', '.join(OPTIMIZERS)}.{hint}")
    if optim.startswith("paged") and device.type != "cuda":
        raise UserError(
            f"train.optim is '{optim}', whose moments lie in CUDA's managed memory, "
            f"but training runs on the {device.type}; use 'adamw_8bit'."
        )
    if optim.endswith("8bit") and dtype != torch.float32:
        raise UserError(
            f"train.optim is '{optim}', which steps float32 factors, but these are "
            f"{str(dtype).removeprefix('torch.')}; use 'adamw_torch', or wire.dtype=float32."
        )


class SlotOptimizer:
    """One optimizer for K rows of ``parameters [K, P]``, updated in place.

    ``live`` returns the numbers of each row that are no padding, for 8-bit moments; by default a
    row is one factor without padding.

    Moments begin at zero in every round: the server's SVD rotates the factors, so the moments of
    the last round would belong to other directions.

    Raises:
        ValueError, UserError: as ``check_optimizer``.
    """

    betas = (0.9, 0.999)

    def __init__(
        self,
        parameters: Tensor,
        *,
        optim: str,
        weight_decay: float = 0.0,
        adam_epsilon: float = 1e-6,
        live: Callable[[], Sequence[Live]] | None = None,
    ) -> None:
        check_optimizer(optim, parameters.device, parameters.dtype)
        self.parameters, self.optim, self.weight_decay = parameters, optim, weight_decay
        self.adam_epsilon = adam_epsilon
        self.steps = [0] * parameters.shape[0]
        if optim == "adamw_torch":
            self.first = torch.zeros_like(parameters)
            self.second = torch.zeros_like(parameters)
        elif optim.endswith("8bit"):
            numbers = live() if live else [Live(sizes=(row.numel(),)) for row in parameters]
            self.moments = BlockwiseMoments(parameters, numbers, paged=optim.startswith("paged"))

    @torch.no_grad()
    def step(self, gradients: Tensor, learning_rates: Sequence[float]) -> None:
        """One step of the first ``len(learning_rates)`` rows; the others do not change."""
        rows = len(learning_rates)
        self.steps[:rows] = [steps + 1 for steps in self.steps[:rows]]
        if self.optim.endswith("8bit"):
            self._step_in_8_bits(gradients, learning_rates)
            return
        parameters, gradients = self.parameters[:rows], gradients[:rows]
        rates = parameters.new_tensor(learning_rates)[:, None]
        if self.optim == "sgd":
            decayed = gradients + self.weight_decay * parameters if self.weight_decay else gradients
            parameters.sub_(rates * decayed)
            return
        beta1, beta2 = self.betas
        first, second = self.first[:rows], self.second[:rows]
        if self.weight_decay:
            parameters.mul_(1.0 - rates * self.weight_decay)
        first.lerp_(gradients, 1.0 - beta1)
        second.mul_(beta2).addcmul_(gradients, gradients, value=1.0 - beta2)
        bias_1 = [1.0 - beta1**steps for steps in self.steps[:rows]]
        bias_2 = [(1.0 - beta2**steps) ** 0.5 for steps in self.steps[:rows]]
        corrected = parameters.new_tensor(bias_2)[:, None]
        denominator = (second.sqrt() / corrected).add_(self.adam_epsilon)
        scaled = [rate / bias for rate, bias in zip(learning_rates, bias_1, strict=True)]
        parameters.sub_(parameters.new_tensor(scaled)[:, None] * first / denominator)

    def _step_in_8_bits(self, gradients: Tensor, learning_rates: Sequence[float]) -> None:
        for row, rate in enumerate(learning_rates):
            self.moments.step(
                row,
                self.parameters[row],
                gradients[row],
                step=self.steps[row],
                learning_rate=rate,
                betas=self.betas,
                epsilon=self.adam_epsilon,
                weight_decay=self.weight_decay,
            )
        self.moments.settle()
