"""Profiles of real cards and boards, and of the local machine.

Numbers are the vendor's, from ``source``, or None where none is published or a laptop's power limit
decides. ``tensor_tflops`` is dense 16-bit matrix throughput with float32 accumulation, without
sparsity; a GeForce's is half of that with 16-bit accumulation. ``watts`` is the power of the board
(of a laptop's card, of a module) at the largest limit that the vendor names. Apple, Google, Samsung
and Raspberry Pi name none: see ``watts_source``. The power of an idle device counts as 0.

A process can use less memory than the nominal size: see ``Device.usable_bytes``.
"""

from __future__ import annotations

import difflib
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial

from flexlora.errors import UserError

__all__ = ["DEVICES", "Device", "find_device", "near_devices", "this_machine"]

GIB = 2**30
CUDA_RUNTIME = GIB // 2  # context, cuBLAS workspaces and loaded kernels; not measured here
# 0.42 to 0.48 GB measured before a model is loaded (benchmarks/memory.py); the rest for Flower and
# the rows of the client.
CPU_RUNTIME = GIB


@dataclass(frozen=True)
class Device:
    """One card, board or machine: its memory, bandwidth, throughput and power.

    ``watts_source`` is empty where ``source`` gives the power too. ``unified`` memory is shared
    with the operating system. ``error_correcting`` cards of GDDR memory use a sixteenth of it for
    the codes. ``bfloat16``: 16-bit training runs in hardware; ``quantizes``: bitsandbytes runs.
    ``free_bytes`` is the measured free memory of the local machine.
    """

    name: str
    memory_gib: float
    bandwidth_gbs: float | None = None
    tensor_tflops: float | None = None
    float32_tflops: float | None = None
    watts: float | None = None
    source: str = ""
    watts_source: str = ""
    _: KW_ONLY
    kind: str = "cuda"
    unified: bool = False
    error_correcting: bool = False
    bfloat16: bool = True
    quantizes: bool = True
    free_bytes: int | None = None

    @property
    def memory_bytes(self) -> int:
        visible = 15 / 16 if self.error_correcting else 1.0
        return round(self.memory_gib * visible * GIB)

    @property
    def usable_bytes(self) -> int:
        """Bytes for a process: all of a card, three quarters of a shared memory.

        Of a shared memory a quarter, at least 1 and at most 8 GiB, is left to the system and other
        programs. ``free_bytes`` counts in full.
        """
        if self.free_bytes is not None:
            return self.free_bytes
        if not self.unified:
            return self.memory_bytes
        return self.memory_bytes - min(8 * GIB, max(GIB, self.memory_bytes // 4))

    @property
    def runtime_bytes(self) -> int:
        """Bytes of the training process in this memory before the model is loaded."""
        of_cuda = CUDA_RUNTIME if self.kind == "cuda" else 0
        return of_cuda + (CPU_RUNTIME if self.unified else 0)


_TURING = "NVIDIA Turing whitepaper, founders edition"
_GA102 = "NVIDIA Ampere GA102 whitepaper, appendix A"
_ADA = "NVIDIA Ada GPU architecture whitepaper, appendix A"
_BLACKWELL = "NVIDIA RTX Blackwell GPU architecture whitepaper, appendix A"
_GEFORCE = "NVIDIA's GeForce product page, cores and boost clock"
_ORIN = "NVIDIA Jetson Orin series technical brief"
_APPLE = "Apple's technical specifications"
_LAPTOP = "NVIDIA's comparison of GeForce laptops: largest graphics power without Dynamic Boost"
_GB10 = "NVIDIA at Hot Chips 2025: the chip's design power; the supply sold with it gives 240 W"
_SXM = "the same, SXM; the PCIe card has 250 W"
_ADAPTER = "the power adapter that Apple ships with it (the 14-inch MacBook Pro's): an upper bound"
_BOARD = "assumed: reviews measure 12 to 15 W at full load; the supply sold with it gives 27 W"
_PHONE = "assumed: AnandTech measured 3.7 to 5.5 W with four large cores of a phone at work"


_ecc = partial(Device, error_correcting=True)
_jetson = partial(Device, unified=True)
# Machines without CUDA: training runs on the processor.
_shared = partial(Device, kind="cpu", unified=True, bfloat16=False, quantizes=False)

# Name, memory in GiB, GB/s, TFLOPS of 16-bit matrices, TFLOPS in float32, watts, source.
_PROFILES = (
    _jetson("Jetson Orin Nano 4GB", 4, 34.0, None, 0.64, 10, _ORIN),
    _jetson("Jetson Orin Nano 8GB", 8, 68.0, None, 1.28, 15, _ORIN),
    _jetson("Jetson Orin NX 8GB", 8, 102.4, None, 1.57, 20, _ORIN),
    _jetson("Jetson Orin NX 16GB", 16, 102.4, None, 1.88, 25, _ORIN),
    _jetson("Jetson AGX Orin 32GB", 32, 204.8, None, 3.33, 40, _ORIN),
    _jetson("Jetson AGX Orin 64GB", 64, 204.8, None, 5.3, 60, _ORIN),
    _jetson("Jetson AGX Thor", 128, 273.0, None, None, 130, "NVIDIA Jetson Thor datasheet"),
    _jetson("DGX Spark", 128, 273.0, None, None, 140, "NVIDIA DGX Spark datasheet", _GB10),
    Device("RTX 3060 Laptop", 6, 336.0, None, None, 115, _GEFORCE, _LAPTOP),
    Device("RTX 4060 Laptop", 8, 256.0, None, None, 115, _GEFORCE, _LAPTOP),
    Device("RTX 4090 Laptop", 16, 576.0, None, None, 150, _GEFORCE, _LAPTOP),
    Device("RTX 2080 Ti", 11, 616.0, 56.9, 14.2, 260, _TURING, bfloat16=False),
    Device("RTX 3060", 12, 360.0, None, 12.7, 170, _GEFORCE),
    Device("RTX 3070", 8, 448.0, 40.6, 20.3, 220, _GA102),
    Device("RTX 3080", 10, 760.0, 59.5, 29.8, 320, _GA102),
    Device("RTX 3090", 24, 936.0, 71.0, 35.6, 350, _GA102),
    Device("RTX 4060", 8, 272.0, None, 15.1, 115, _GEFORCE),
    Device("RTX 4060 Ti 16GB", 16, 288.0, None, 22.1, 165, _GEFORCE),
    Device("RTX 4070", 12, 504.0, None, 29.1, 200, _GEFORCE),
    Device("RTX 4080", 16, 716.8, 97.5, 48.7, 320, _ADA),
    Device("RTX 4090", 24, 1008.0, 165.2, 82.6, 450, _ADA),
    Device("RTX 5080", 16, 960.0, 112.6, 56.3, 360, _BLACKWELL),
    Device("RTX 5090", 32, 1792.0, 209.5, 104.8, 575, _BLACKWELL),
    _ecc("T4", 16, 320.0, 65.0, 8.1, 70, "NVIDIA T4 datasheet", bfloat16=False),
    Device("V100 16GB", 16, 900.0, 125.0, 15.7, 300, "NVIDIA V100 datasheet, SXM2", bfloat16=False),
    Device("V100 32GB", 32, 900.0, 125.0, 15.7, 300, "NVIDIA V100 datasheet, SXM2", bfloat16=False),
    _ecc("L4", 24, 300.0, 121.0, 30.3, 72, "NVIDIA L4 datasheet"),
    _ecc("A10", 24, 600.0, 125.0, 31.2, 150, "NVIDIA A10 datasheet"),
    Device("A30", 24, 933.0, 165.0, 10.3, 165, "NVIDIA A30 datasheet"),
    _ecc("A40", 48, 696.0, 149.7, 37.4, 300, "NVIDIA A40 datasheet"),
    _ecc("RTX A6000", 48, 768.0, 154.8, 38.7, 300, _GA102),
    _ecc("L40S", 48, 864.0, 362.0, 91.6, 350, "NVIDIA L40S datasheet"),
    _ecc("RTX 6000 Ada", 48, 960.0, 364.2, 91.1, 300, "NVIDIA RTX 6000 Ada datasheet"),
    Device("A100 40GB", 40, 1555.0, 312.0, 19.5, 400, "NVIDIA A100 datasheet", _SXM),
    Device("A100 80GB", 80, 2039.0, 312.0, 19.5, 400, "NVIDIA A100 datasheet, SXM"),
    Device("H100 PCIe", 80, 2000.0, 756.0, 51.0, 350, "NVIDIA H100 datasheet"),
    Device("H100 SXM", 80, 3350.0, 989.0, 67.0, 700, "NVIDIA H100 datasheet"),
    Device("H200", 141, 4800.0, 989.0, 67.0, 700, "NVIDIA H200 datasheet"),
    _shared("MacBook Air M1 8GB", 8, 68.25, None, None, 30, _APPLE, _ADAPTER),
    _shared("MacBook Air M2 16GB", 16, 100.0, None, None, 30, _APPLE, _ADAPTER),
    _shared("MacBook Pro M4 Max 64GB", 64, 546.0, None, None, 96, _APPLE, _ADAPTER),
    _shared("Raspberry Pi 5 8GB", 8, None, None, None, 12, "Raspberry Pi 5 product brief", _BOARD),
    _shared("Pixel 6a", 6, None, None, None, 5, "Google's Pixel 6a specifications", _PHONE),
    _shared("Pixel 8", 8, None, None, None, 5, "Google's Pixel 8 specifications", _PHONE),
    _shared("Pixel 8 Pro", 12, None, None, None, 5, "Google's Pixel 8 Pro specifications", _PHONE),
    _shared("Galaxy S24", 8, None, None, None, 5, "Samsung's specifications", _PHONE),
    _shared("Galaxy S24 Ultra", 12, None, None, None, 5, "Samsung's specifications", _PHONE),
)

DEVICES: Mapping[str, Device] = {device.name: device for device in _PROFILES}


def _plain(name: str) -> str:
    """Letters and digits of a name, without the vendor's."""
    words = re.sub(r"nvidia|geforce|tesla|quadro|apple", " ", name.lower())
    return re.sub(r"[^a-z0-9]", "", words)


def find_device(name: str) -> Device:
    """The profile of that name, whatever its case, spaces and vendor.

    Raises:
        UserError: no profile has that name; the nearest ones are named.
    """
    known = {_plain(device): device for device in DEVICES}
    if _plain(name) in known:
        return DEVICES[known[_plain(name)]]
    raise UserError(
        f"device '{name}' is not known.{near_devices(name)} `flexlora plan --model MODEL --table` "
        "lists all that are; --memory takes any size."
    )


def near_devices(name: str) -> str:
    """`` Did you mean 'x' or 'y'?`` for profiles with similar names, or the empty string."""
    known = {_plain(device): device for device in DEVICES}
    wanted = _plain(name)
    holding = [full for plain, full in known.items() if wanted and wanted in plain]
    near = holding or [known[x] for x in difflib.get_close_matches(wanted, known, n=3)]
    return f" Did you mean {' or '.join(repr(n) for n in near[:4])}?" if near else ""


def this_machine() -> Device:
    """The card that ``nvidia-smi`` shows first, else this computer's processor and memory.

    ``free_bytes`` is the memory free now.
    """
    shown = _nvidia_smi()
    if shown is not None:
        name, total, free, capability = shown
        known = next((DEVICES[n] for n in DEVICES if _plain(n) == _plain(name)), Device(name, 0))
        return replace(
            known,
            name=name,
            memory_gib=total / 1024,
            source="nvidia-smi",
            watts_source="",
            error_correcting=False,
            bfloat16=capability >= 8.0,
            free_bytes=round(free * 2**20),
        )
    import psutil

    memory = psutil.virtual_memory()
    return Device(
        name=f"this computer ({os.cpu_count()} cores)",
        memory_gib=memory.total / GIB,
        source="psutil",
        kind="cpu",
        unified=True,
        bfloat16=_processor_has_bfloat16(),
        free_bytes=memory.available,
    )


def _nvidia_smi() -> tuple[str, float, float, float] | None:
    """Name, MiB in all, MiB free and compute capability of the first card."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    asked = "--query-gpu=name,memory.total,memory.free,compute_cap"
    command = [program, asked, "--format=csv,noheader,nounits"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        name, total, free, capability = shown.stdout.splitlines()[0].rsplit(", ", 3)
        return name, float(total), float(free), float(capability)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None  # a driver that does not answer has no card to plan for


def _processor_has_bfloat16() -> bool:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return "bf16" in file.read()
    except OSError:
        return False
