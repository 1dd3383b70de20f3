"""How many cores a run may use, and how its threads wait for each other.

torch's threads are OpenMP's: the wheels carry GNU's library, which reads ``OMP_WAIT_POLICY`` (and
``GOMP_SPINCOUNT``) when torch is loaded, and nothing of Intel's ``KMP_BLOCKTIME``. By default a
thread that waits spins for milliseconds. Where another process has its core, it spins in the place
of the thread that it waits for: a step took twenty times as long (docs/log.md).
"""

from __future__ import annotations

import math
import os
from pathlib import Path

__all__ = ["allowed_cores", "free_cores", "wait_passively"]

SAMPLE_SECONDS = 0.2
UNNOTICED = 0.25  # of a core: what the system itself and a sample's rounding take


def wait_passively() -> None:
    """Let OpenMP's threads sleep while they wait; call it before torch is loaded.

    A value that is set is left.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def allowed_cores(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores of this process's affinity, or fewer where its control group has a quota."""
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    return max(1, min(len(affinity(0)), _quota(root)))


def free_cores() -> int:
    """The allowed cores less those that are busy now, over 0.2 seconds; at least 1."""
    import psutil

    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    percent = psutil.cpu_percent(interval=SAMPLE_SECONDS, percpu=True)
    cores = [core for core in affinity(0) if core < len(percent)]
    busy = sum(percent[core] for core in cores) / 100.0
    return max(1, min(allowed_cores(), len(cores) - round(max(0.0, busy - UNNOTICED))))


def _quota(root: Path) -> int:
    """Whole cores of the quota of cgroup v2 or v1, rounded up; very many without one."""
    try:
        quota, period = (root / "cpu.max").read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        try:
            quota, period = (
                (root / "cpu" / f"cpu.cfs_{name}_us").read_text(encoding="utf-8").strip()
                for name in ("quota", "period")
            )
        except OSError:
            return 1 << 16
    if not quota.isdigit():  # "max", or -1
        return 1 << 16
    return max(1, math.ceil(int(quota) / int(period)))
