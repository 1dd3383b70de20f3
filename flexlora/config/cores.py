"""How many cores a run may use, and how its threads wait for each other.

torch's threads are OpenMP's: the wheels carry GNU's library, which reads ``OMP_WAIT_POLICY`` (and
``GOMP_SPINCOUNT``) when torch is loaded, and nothing of Intel's ``KMP_BLOCKTIME``. By default a
thread that waits spins for milliseconds. Where another process has its core, it spins in the place
of the thread that it waits for: a step took twenty times as long (docs/log.md).
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

__all__ = ["allowed_cores", "free_cores", "wait_passively"]

SAMPLE_SECONDS = 0.2
UNNOTICED = 0.25  # of a core: what the system itself and a sample's rounding take


def wait_passively() -> None:
    """Let OpenMP's threads sleep while they wait, where cores are shared; before torch is loaded.

    Alone on its cores a tiny model would be 1.4 times slower so (docs/log.md). A value that is set
    is left.
    """
    if "OMP_WAIT_POLICY" not in os.environ and _shared():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def _shared() -> bool:
    """Whether others run on a quarter of the cores in each of five looks, 10 ms apart."""
    others = min(_others_running(wait) for wait in (0.0, 0.01, 0.01, 0.01, 0.01))
    return others >= max(1, (os.cpu_count() or 1) // 4)


def _others_running(wait: float) -> int:
    """Tasks that run or could, without this one; 0 where the system does not tell."""
    time.sleep(wait)
    try:
        text = Path("/proc/loadavg").read_text(encoding="utf-8")
        return int(text.split()[3].partition("/")[0]) - 1
    except (OSError, ValueError, IndexError):
        return 0


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
