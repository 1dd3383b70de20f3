"""What a device does in a second: as its vendor published it, or as derived here, and then marked.

A clock needs a number for every profile; ``flexlora/planning/devices.py`` has only those that were
published. The others come from what was:

    cores * clock * 2      float32 of a GeForce laptop's card, at its largest power and boost clock
    2 * float32            16-bit matrix units of a GeForce with float32 sums: the ratio in NVIDIA's
                           whitepapers of Ampere, Ada and Blackwell, for the cards that are listed
    8 * float32            of a Jetson Orin: half of the dense INT8 rate in the technical brief
    FP4 sparse / 8         of Thor, whose matrix units are a data centre's (2,070 TFLOPS)
    sum of cores * clock * FLOPs per cycle
                           of a processor: 32 in float32 for a core with four 128-bit pipes
                           (Cortex-X, Apple's large cores), 16 with two, 8 with one or a shared one;
                           Apple's and the phones' matrix units and GPUs are not counted, since the
                           training runs on the processor
"""

from __future__ import annotations

from dataclasses import dataclass

from flexlora.planning.devices import Device

__all__ = ["Rates", "rates_of"]


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Peaks of one device; ``derived`` names those that no vendor published as they stand here."""

    float32_tflops: float
    tensor_tflops: float
    bandwidth_gbs: float
    watts: float
    derived: tuple[str, ...] = ()

    def tflops(self, dtype: str) -> float:
        """The peak in a dtype of the base; float64, which only tests use, counts as float32."""
        return self.tensor_tflops if dtype == "bfloat16" else self.float32_tflops


_FLOAT32 = {
    "Jetson AGX Thor": 2 * 2560 * 1.575 / 1000,  # cores, GHz
    "DGX Spark": 31.0,  # as NVIDIA presented it (Hot Chips 2025)
    "RTX 3060 Laptop": 2 * 3840 * 1.703 / 1000,
    "RTX 4060 Laptop": 2 * 3072 * 2.370 / 1000,
    "RTX 4090 Laptop": 2 * 9728 * 2.040 / 1000,
    "MacBook Air M1 8GB": (4 * 3.2 * 32 + 4 * 2.06 * 16) / 1000,
    "MacBook Air M2 16GB": (4 * 3.49 * 32 + 4 * 2.42 * 16) / 1000,
    "MacBook Pro M4 Max 64GB": (12 * 4.5 * 32 + 4 * 2.6 * 16) / 1000,
    "Raspberry Pi 5 8GB": 4 * 2.4 * 16 / 1000,
    "Pixel 6a": (2 * 2.8 * 32 + 2 * 2.25 * 16 + 4 * 1.8 * 8) / 1000,
    "Pixel 8": (2.91 * 32 + 4 * 2.37 * 16 + 4 * 1.7 * 8) / 1000,
    "Pixel 8 Pro": (2.91 * 32 + 4 * 2.37 * 16 + 4 * 1.7 * 8) / 1000,
    "Galaxy S24": (3.3 * 32 + 3 * 3.2 * 16 + 2 * 3.0 * 16 + 2 * 2.3 * 8) / 1000,
    "Galaxy S24 Ultra": (3.3 * 32 + 3 * 3.2 * 16 + 2 * 3.0 * 16 + 2 * 2.3 * 8) / 1000,
}

# Bytes of the bus times transfers a second. Of the Pixels' chips the bus alone is known: assumed.
_BANDWIDTH = {
    "Raspberry Pi 5 8GB": 4 * 4.267,
    "Pixel 6a": 8 * 6.4,
    "Pixel 8": 8 * 6.4,
    "Pixel 8 Pro": 8 * 6.4,
    "Galaxy S24": 8 * 9.6,
    "Galaxy S24 Ultra": 8 * 9.6,
}


def rates_of(device: Device) -> Rates:
    """The device's own numbers, completed.

    Raises:
        ValueError: a device that is no profile and leaves a number out.
    """
    float32 = device.float32_tflops or _FLOAT32.get(device.name)
    bandwidth = device.bandwidth_gbs or _BANDWIDTH.get(device.name)
    if float32 is None or bandwidth is None or device.watts is None:
        raise ValueError(f"{device.name} has no float32_tflops, bandwidth_gbs or watts to go by.")
    tensor = device.tensor_tflops or _tensor_tflops(device, float32)
    published = {
        "float32_tflops": device.float32_tflops,
        "tensor_tflops": device.tensor_tflops,
        "bandwidth_gbs": device.bandwidth_gbs,
    }
    return Rates(
        float32_tflops=float32,
        tensor_tflops=tensor,
        bandwidth_gbs=bandwidth,
        watts=device.watts,
        derived=tuple(name for name, value in published.items() if value is None),
    )


def _tensor_tflops(device: Device, float32: float) -> float:
    if device.name == "Jetson AGX Thor":
        return 2070 / 8
    if device.kind == "cpu":
        return float32
    return (8 if device.name.startswith("Jetson") else 2) * float32
