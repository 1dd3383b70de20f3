"""The cores that a run uses, and how its threads wait."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from federation import small
from flexlora.config import cores, resolve
from flexlora.config.cores import allowed_cores, free_cores, wait_passively
from flexlora.config.resolve import resolved


@pytest.fixture
def eight(monkeypatch):
    """A machine of eight cores, of which this process may use the first six."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setattr(cores, "_quota", lambda root: 1 << 16)

    def busy(*percent):
        monkeypatch.setattr(psutil, "cpu_percent", lambda interval, percpu: list(percent))

    return busy


@pytest.mark.parametrize(
    ("percent", "free"),
    [
        ([0] * 8, 6),
        ([30, 20, 10, 0, 0, 0, 0, 0], 6),  # the system's own work
        ([100, 99, 0, 0, 0, 0, 0, 0], 4),
        ([50, 50, 50, 50, 0, 0, 0, 0], 4),  # two processes that move about
        ([0, 0, 0, 0, 0, 0, 100, 100], 6),  # cores that are not this process's
        ([100] * 8, 1),
    ],
)
def test_busy_cores_are_left_to_those_who_use_them(eight, percent, free):
    eight(*percent)
    assert free_cores() == free


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "max 100000\n"}, 6),
        ({"cpu.max": "250000 100000\n"}, 3),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 6),
        ({}, 6),
    ],
)
def test_a_control_groups_quota_bounds_them(monkeypatch, tmp_path, files, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert allowed_cores(tmp_path) == expected


def test_the_free_cores_are_fixed_in_the_configuration(monkeypatch):
    monkeypatch.setattr(resolve, "free_cores", lambda: 5)
    assert resolved(small(engine__threads=0)).engine.threads == 5
    assert resolved(small(engine__threads=0, engine__workers=2)).engine.threads == 2
    assert resolved(small(engine__threads=0, engine__workers=8)).engine.threads == 1
    monkeypatch.setattr(resolve, "free_cores", lambda: 1)
    assert resolved(small(engine__threads=7)).engine.threads == 7


@pytest.mark.parametrize(
    ("running", "cpus", "expected"),
    [
        ([1, 1, 1, 1, 1], 2, None),  # alone
        ([3, 3, 1, 3, 3], 2, None),  # what others do ends at once
        ([2, 2, 3, 2, 2], 2, "PASSIVE"),
        ([9, 9, 9, 9, 9], 64, None),  # eight of 64 cores
        ([17, 18, 17, 19, 17], 64, "PASSIVE"),
    ],
)
def test_threads_sleep_where_others_have_a_quarter_of_the_cores(
    monkeypatch, running, cpus, expected
):
    texts = iter(f"0.1 0.2 0.3 {count}/210 99" for count in running)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: next(texts))
    monkeypatch.setattr(os, "cpu_count", lambda: cpus)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    wait_passively()
    assert os.environ.get("OMP_WAIT_POLICY") == expected


def test_a_policy_that_is_set_is_left(monkeypatch):
    monkeypatch.setattr(cores, "_shared", lambda: True)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    wait_passively()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


def test_the_command_waits_passively_before_torch_is_loaded():
    program = (
        "import os, sys; from flexlora.commands.cli import main\n"
        "from flexlora.config import cores\n"
        "cores._shared = lambda: True; before = 'torch' in sys.modules\n"
        "sys.argv[1:] = ['plan', '--help']; main(); print(before, os.environ['OMP_WAIT_POLICY'])"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert done.stdout.splitlines()[-1] == "False PASSIVE", done.stderr
