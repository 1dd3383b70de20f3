"""Probe a machine: which kernels run and how much memory is free.

A library may import and still crash at its first kernel or return wrong numbers. So each kernel
that training may need runs once per process on small matrices, forward and backward, and its result
is compared with a float32 product. A kernel that fails is reported as absent, with its error.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from flexlora.errors import UserError, one_line
from flexlora.training.optim import SlotOptimizer, check_optimizer

__all__ = [
    "KERNELS",
    "Probe",
    "device_name",
    "free_bytes",
    "probe",
    "require",
    "require_optimizer",
]

SIZE = 64  # NF4's block


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The kernels that ran, and those that did not: ``"nf4: RuntimeError: ..."``."""

    runs: tuple[str, ...]
    absent: tuple[str, ...]

    def error(self, kernel: str) -> str:
        """Why ``kernel`` is absent; empty where it ran."""
        errors = [text.partition(": ")[2] for text in self.absent if text.startswith(f"{kernel}: ")]
        return errors[0] if errors else ""


def _inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """``x [8, n]``, ``weight [n, n]`` and an output gradient ``[8, n]``, from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    x, weight, gradient = (
        torch.randn(rows, SIZE, generator=generator) * SIZE**-0.5 for rows in (8, SIZE, 8)
    )
    return x.to(device, dtype), weight.to(device, dtype), gradient.to(device, dtype)


def _compare(what: str, got: Tensor, wanted: Tensor, tolerance: float) -> None:
    error = float((got.float() - wanted.float()).norm() / wanted.float().norm())
    if not error <= tolerance:
        raise ArithmeticError(f"the {what} is off by {error:.2g}, expected {tolerance:g} at most")


def bf16_product(device: torch.device) -> None:
    """``x W^T`` in bfloat16."""
    x, weight, _ = _inputs(device, torch.bfloat16)
    _compare("product", x @ weight.T, x.float() @ weight.float().T, 0.02)


def nf4_step(device: torch.device) -> None:
    """Forward and backward through a doubly quantized NF4 linear."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    x, weight, gradient = _inputs(device, torch.float32)
    linear = Linear4bit(SIZE, SIZE, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    linear.weight = Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4")
    linear.support_avx512bf16_for_cpu = False  # as in training: see slots.py
    _through(linear.to(device), x, weight, gradient, 0.2)


def int8_step(device: torch.device) -> None:
    """Forward and backward through an 8-bit linear."""
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    x, weight, gradient = _inputs(device, torch.float32)
    linear = Linear8bitLt(SIZE, SIZE, bias=False, has_fp16_weights=False, threshold=0.0)
    linear.weight = Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
    _through(linear.to(device), x, weight, gradient, 0.05)


def _through(
    linear: torch.nn.Module, x: Tensor, weight: Tensor, gradient: Tensor, tolerance: float
) -> None:
    x.requires_grad_(True)
    out = linear(x)
    _compare("product", out.detach(), (x @ weight.T).detach(), tolerance)
    (back,) = torch.autograd.grad(out, x, gradient.to(out.dtype))
    _compare("gradient", back, gradient @ weight, tolerance)


def adamw_8bit_step(device: torch.device) -> None:
    """Three steps of AdamW with 8-bit moments against three with float32 moments."""
    _, start, _ = _inputs(device, torch.float32)
    changes = []
    for optim in ("adamw_8bit", "adamw_torch"):
        parameters = start.reshape(1, -1).clone()
        optimizer = SlotOptimizer(parameters, optim=optim)
        for _ in range(3):
            optimizer.step(parameters - 0.01, [0.01])
        changes.append(parameters - start.reshape(1, -1))
    _compare("change", changes[0], changes[1], 0.05)


KERNELS: dict[str, Callable[[torch.device], None]] = {
    "bf16": bf16_product,
    "nf4": nf4_step,
    "8bit": int8_step,
    "adamw_8bit": adamw_8bit_step,
}


@lru_cache(maxsize=4)
def probe(device: torch.device) -> Probe:
    """Run every kernel once on ``device``; cached per process."""
    # bitsandbytes logs each cast of an input, which is harmless.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    runs, absent = [], []
    for name, kernel in KERNELS.items():
        try:
            kernel(device)
            runs.append(name)
        except Exception as error:  # a broken library may raise any error
            absent.append(f"{name}: {one_line(error)}")
    return Probe(runs=tuple(runs), absent=tuple(absent))


def require(quantization: str, device: torch.device, *, key: str) -> None:
    """Refuse a base that this machine cannot run.

    Raises:
        UserError: names ``key``, the kernel's error and what to use instead.
    """
    if quantization != "none":
        _require_kernel(quantization, device, what=f"{key} is '{quantization}'", instead="none")


def require_optimizer(optim: str, device: torch.device, *, dtype: torch.dtype) -> None:
    """Refuse an optimizer of factors in ``dtype`` that this machine cannot run.

    Raises:
        UserError: names what the optimizer needs, or the kernel's error, and what to use instead.
    """
    check_optimizer(optim, device, dtype)
    if optim.endswith("8bit"):
        what = f"train.optim is '{optim}'"
        _require_kernel("adamw_8bit", device, what=what, instead="adamw_torch")


def _require_kernel(kernel: str, device: torch.device, *, what: str, instead: str) -> None:
    error = probe(device).error(kernel)
    if error:
        raise UserError(
            f"{what}, which bitsandbytes cannot run on this machine's {device.type}: "
            f"{error.rstrip('.')}; use '{instead}', or `flexlora doctor`."
        )


def free_bytes(device: torch.device) -> int:
    """Bytes of memory free on ``device`` now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def device_name(device: torch.device) -> str:
    """``cpu (x86_64)`` or ``cuda (NVIDIA A10)``."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"{device.type} ({platform.machine()})"
