"""A device that reports ``cuda:0`` and raises as CUDA does, on a machine without one.

    with cuda_like(total_bytes=2**30) as card:
        worker = Worker(small())  # trains, evaluates and generates on cuda:0

Numbers are computed on the CPU: a tensor of the device wraps one of the host. Mistakes that a
function replaced by a mock would let through are raised in torch's words:

    an operation of tensors of two devices, but for zero-dimensional ones and indices of the host
    ``numpy()`` of a tensor of the device
    a generator of another device
    ``torch.cuda``'s functions: torch's own Python code runs, over a fake of its C functions, so a
    device without an index is refused where CUDA refuses it
    more bytes than the device has, or than ``set_per_process_memory_fraction`` leaves of it

In C++ the tensors are of the device ``meta``, since this build of torch has no guard for CUDA: code
that takes another way in C++ for CUDA (fused kernels, streams) is not what runs here. One device,
one thread; bitsandbytes' kernels are absent.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import bitsandbytes  # noqa: F401  (as dynamo, it looks for CUDA when it is imported)
import pytest
import torch
import torch._dynamo.device_interface
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

__all__ = ["DEVICE", "Card", "CudaTensor", "cuda_like", "upload"]

DEVICE = torch.device("cuda", 0)

aten = torch.ops.aten
# Written in C++ as several operations, some of which make tensors. One that is missing here ends in
# an error about the device meta.
_COMPOSITES = {torch.nn.functional.scaled_dot_product_attention, torch.where, Tensor.where}
# Operations that read tensors of both devices: copies, and indices of the host.
_BETWEEN = {aten.copy_, aten._to_copy, aten.index, aten.index_put, aten.index_put_}
_card: Card | None = None  # the device inside ``cuda_like``


class _Allocation:
    """Bytes of a storage on the device; freed with the last tensor that refers to it."""

    def __init__(self, card: Card, storage: torch.UntypedStorage) -> None:
        card.take(storage.nbytes())
        self.storage = storage  # its address is not given to another while this lives
        weakref.finalize(self, card.release, storage.nbytes())


class Card:
    """The memory of the device. ``calls`` are the names of the C functions called, in order."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes, self.fraction = total_bytes, 1.0
        self.allocated = self.peak = 0
        self.calls: list[str] = []
        self._storages: weakref.WeakValueDictionary[int, _Allocation]
        self._storages = weakref.WeakValueDictionary()

    def hold(self, host: Tensor) -> _Allocation:
        """The allocation of ``host``'s storage, one for all views of it."""
        storage = host.untyped_storage()
        held = self._storages.get(storage._cdata)
        if held is None:
            held = self._storages[storage._cdata] = _Allocation(self, storage)
        return held

    def take(self, nbytes: int) -> None:
        """Raises: OutOfMemoryError: more than the process may have."""
        limit = int(self.fraction * self.total_bytes)
        if self.allocated + nbytes > limit:
            raise torch.cuda.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {nbytes} bytes. GPU 0 has a total capacity "
                f"of {self.total_bytes} bytes, of which {limit - self.allocated} are free."
            )
        self.allocated += nbytes
        self.peak = max(self.peak, self.allocated)

    def release(self, nbytes: int) -> None:
        self.allocated -= nbytes

    def stats(self, device: int) -> dict[str, Any]:
        _known(device)
        counts = {"current": self.allocated, "peak": self.peak}
        return {"allocated_bytes": {"all": counts}, "reserved_bytes": {"all": counts}}

    def reset_peak(self, device: int) -> None:
        _known(device)
        self.peak = self.allocated

    def set_fraction(self, fraction: float, device: int) -> None:
        _known(device)
        self.fraction = fraction

    def mem_get_info(self, device: int) -> tuple[int, int]:
        _known(device)
        return self.total_bytes - self.allocated, self.total_bytes


def _known(device: int) -> None:
    if device != 0:
        raise RuntimeError("CUDA error: invalid device ordinal")


class CudaTensor(Tensor):
    """A tensor of the device; ``host`` has its numbers."""

    host: Tensor
    allocation: _Allocation

    @staticmethod
    def __new__(cls, host: Tensor) -> CudaTensor:
        assert _card is not None, "a tensor of the device outside cuda_like()"
        tensor = Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device="meta",
        )
        tensor.host, tensor.allocation = host, _card.hold(host)
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)

    def get_device(self) -> int:
        return 0

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.detach().cpu().numpy()
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the "
            "tensor to host memory first."
        )

    def __array__(self, *_: object, **__: object) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def __repr__(self, **_: Any) -> str:
        return f"{self.host!r} on {DEVICE}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        _one_device(func, args, kwargs)
        if func.overloadpacket is aten._fused_sdp_choice:
            return 0  # the kernel written in operations: this one's others are the CPU's
        named = kwargs.get("device")
        to_host = named is not None and named.type == "cpu"
        if named is not None:
            kwargs["device"] = torch.device("cpu")
        hosts = {key: _each(_host, value) for key, value in kwargs.items()}
        out = func(*_each(_host, args), **hosts)
        if to_host:
            return out
        wrapped = _each(_wrapped, out)
        return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _host(x: Any) -> Any:
    return x.host if isinstance(x, CudaTensor) else x


def _wrapped(x: Any) -> Any:
    return CudaTensor(x) if isinstance(x, Tensor) else x


def _each(function: Any, x: Any) -> Any:
    """``function`` of every value in nested lists and tuples."""
    if isinstance(x, list | tuple):
        return type(x)([_each(function, item) for item in x])
    return function(x)


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, list | tuple):
        for item in x:
            yield from _tensors(item)
    elif isinstance(x, Tensor):
        yield x


def _one_device(func: Any, args: Any, kwargs: Any) -> None:
    """Raises: RuntimeError: tensors of the device and of the host, as CUDA's kernels do."""
    packet = func.overloadpacket
    if packet in (aten.copy_, aten._to_copy):
        return
    if packet in _BETWEEN and isinstance(args[0], CudaTensor):
        args = (args[0], *args[2:])  # indices may be on the host
    found = _tensors((args, list(kwargs.values())))
    host = [x for x in found if not isinstance(x, CudaTensor)]
    if not host:
        return
    if packet in _BETWEEN:
        host = [x for x in host if x is args[0] or x.dim()]
        cause = "indices should be either on cpu or on the same device as the indexed tensor (cpu)"
    else:
        host = [x for x in host if x.dim()]
        cause = (
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"cuda:0 and cpu! (when checking arguments of {func})"
        )
    if host:
        raise RuntimeError(cause)


class _Upload(torch.autograd.Function):
    """A copy on the device; its gradient is copied back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return CudaTensor(tensor.detach().clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].cpu()


def upload(tensor: Tensor) -> Tensor:
    """``tensor`` on the device: itself where it is there."""
    return tensor if isinstance(tensor, CudaTensor) else _Upload.apply(tensor)


_HostGenerator = torch.Generator


class _Generator(_HostGenerator):
    """In the place of ``torch.Generator``: of the device where it was asked for."""

    def __new__(cls, device: Any = "cpu") -> Any:
        if torch.device(device).type == "cpu":
            return _HostGenerator()
        return _HostGenerator.__new__(cls)

    def __init__(self, device: Any = "cpu") -> None:
        super().__init__()

    device = property(lambda self: DEVICE)  # type: ignore[assignment]


def _is_cuda(x: Any) -> bool:
    if isinstance(x, str):
        return x == "cuda" or x.startswith("cuda:")
    return isinstance(x, torch.device) and x.type == "cuda"


class _MetaIsCuda(TorchDispatchMode):
    """Makes on the device what an operation would make on ``meta``."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device = (kwargs or {}).get("device")
        if device is None or device.type != "meta" or any(t is CudaTensor for t in types):
            return func(*args, **(kwargs or {}))
        return CudaTensor(func(*args, **{**kwargs, "device": torch.device("cpu")}))


def _moved(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
    """``tensor.to(...)`` where that is to the device; None for other calls."""
    if args and isinstance(args[0], Tensor):  # to the device and dtype of another
        to, dtype = args[0].device, args[0].dtype
    else:
        options = {k: v for k, v in kwargs.items() if k not in ("copy", "memory_format")}
        to, dtype, *_ = torch._C._nn._parse_to(*args, **options)
    if to is None or to.type != "cuda":
        return None
    _known(to.index or 0)
    return upload(tensor if dtype is None else tensor.to(dtype))


class _Factories(TorchFunctionMode):
    """Sends ``device="cuda"`` to ``CudaTensor``, since this build refuses the name."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.cuda:
            return upload(args[0])
        if func is Tensor.to and (moved := _moved(*args, **kwargs)) is not None:
            return moved
        if func in _COMPOSITES and isinstance(args[0], CudaTensor):
            with _MetaIsCuda():
                return func(*args, **kwargs)
        if func is Tensor.new_tensor and isinstance(args[0], CudaTensor):
            kwargs = {"dtype": args[0].dtype, "device": DEVICE} | kwargs
            func, args = torch.tensor, args[1:]
        asked = _is_cuda(kwargs.get("device"))
        if asked:
            kwargs = dict(kwargs)
            _known(torch.device(kwargs.pop("device")).index or 0)
        if "generator" in kwargs:
            self._check_generator(kwargs["generator"], asked, args)
        if func in (torch.as_tensor, torch.tensor) and isinstance(args[0], CudaTensor):
            asked = asked or kwargs.get("device") is None
        out = func(*args, **kwargs)
        return _each(lambda x: upload(x) if isinstance(x, Tensor) else x, out) if asked else out

    @staticmethod
    def _check_generator(generator: Any, asked: bool, args: Any) -> None:
        """Raises: RuntimeError: a generator of another device than the tensor's."""
        if generator is None:
            return
        wanted = "cuda" if asked or any(isinstance(x, CudaTensor) for x in args) else "cpu"
        if generator.device.type != wanted:
            raise RuntimeError(
                f"Expected a '{wanted}' device type for generator but found "
                f"'{generator.device.type}'"
            )


@contextmanager
def cuda_like(total_bytes: int = 2**33) -> Iterator[Card]:
    """Inside the block this process has one CUDA device of ``total_bytes``."""
    global _card
    card = Card(total_bytes)
    with pytest.MonkeyPatch.context() as patch:
        _replace_c_functions(patch, card)
        patch.setattr(torch, "Generator", _Generator)
        before, _card = _card, card
        try:
            with _Factories():
                yield card
        finally:
            _card = before


def _replace_c_functions(patch: pytest.MonkeyPatch, card: Card) -> None:
    def fake(name: str, function: Any) -> None:
        def called(*args: Any) -> Any:
            card.calls.append(name)
            return function(*args)

        patch.setattr(torch._C, name, called, raising=False)

    fake("_cuda_getDeviceCount", lambda: 1)
    fake("_cuda_getDevice", lambda: 0)
    fake("_cuda_setDevice", _known)
    fake("_cuda_synchronize", lambda: None)
    fake("_cuda_emptyCache", lambda: None)
    fake("_cuda_setMemoryFraction", card.set_fraction)
    fake("_cuda_memoryStats", card.stats)
    fake("_cuda_resetPeakMemoryStats", card.reset_peak)
    properties = SimpleNamespace(
        name="A device like CUDA", total_memory=card.total_bytes, major=9, minor=0
    )
    patch.setattr(torch.cuda, "_lazy_init", lambda: None)
    patch.setattr(torch.cuda, "_is_compiled", lambda: True)
    patch.setattr(torch.cuda, "_initialized", True)
    patch.setattr(torch.cuda, "_cached_device_count", 1)
    patch.setattr(torch.cuda, "default_generators", (_Generator("cuda"),))
    patch.setattr(torch.cuda, "_exchange_device", lambda device: 0)
    patch.setattr(torch.cuda, "_maybe_exchange_device", lambda device: 0)
    patch.setattr(torch.cuda, "_get_device_properties", lambda device: properties, raising=False)
    patch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaMemGetInfo=card.mem_get_info))
    patch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    # A checkpointed layer runs again inside ``autograd.grad``, in the mode that this would leave.
    patch.setattr(torch.autograd, "has_torch_function", lambda tensors: False)
