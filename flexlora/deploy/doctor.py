"""``flexlora doctor``: test what training needs on this machine by running it.

A check returns what it found, or what is wrong in one sentence with a remedy. What every run needs
fails; what some runs need (NF4, a card) warns. ``simulations/flower_checks.py`` has the check that
needs Flower, ``clients/setup/superlink_checks.py`` those of a node's SuperLink and trainer.
"""

from __future__ import annotations

import json
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flexlora.errors import UserError, nearest, one_line
from flexlora.wire.files import write_atomically

__all__ = ["CHECKS", "Check", "Finding", "check_format", "diagnose", "report"]

PYTHON = (3, 11)
SMALL_DISK = 2**30
FORMATS = ("text", "json")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """``status`` is ok, warning or failed; ``remedy`` is a command, or where to look."""

    name: str
    status: str
    message: str
    remedy: str = ""


Check = tuple[str, Callable[[], Finding | Sequence[Finding]]]


def ok(message: str, *, name: str = "") -> Finding:
    return Finding(name=name, status="ok", message=message)


def warning(message: str, remedy: str, *, name: str = "") -> Finding:
    return Finding(name=name, status="warning", message=message, remedy=remedy)


def failed(message: str, remedy: str, *, name: str = "") -> Finding:
    return Finding(name=name, status="failed", message=message, remedy=remedy)


def diagnose(checks: Sequence[Check]) -> list[Finding]:
    """Run every check; one that raises has failed, and keeps none of the others from running.

    A finding without a name has its check's.
    """
    findings: list[Finding] = []
    for name, check in checks:
        try:
            seen = check()
        except Exception as error:  # what is broken may break in any way
            seen = failed(
                f"{one_line(error).rstrip('.')}.", "pip install --force-reinstall flexlora"
            )
        several = [seen] if isinstance(seen, Finding) else seen
        findings += [replace(finding, name=finding.name or name) for finding in several]
    return findings


def check_python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < PYTHON:
        wanted = ".".join(map(str, PYTHON))
        return failed(
            f"Python {version}, expected {wanted} or later.", f"python{wanted} -m venv .venv"
        )
    return ok(f"{version} ({sys.executable})")


def check_torch() -> Finding:
    """A product and its gradient, on the CPU."""
    try:
        import torch
    except Exception as error:
        return failed(f"torch cannot be imported: {one_line(error)}", "pip install torch")
    x = torch.eye(8, requires_grad=True)
    ((x @ x).sum()).backward()
    if x.grad is None or not bool((x.grad == 2).all()):
        return failed(
            "a matrix product has a wrong gradient.", "pip install --force-reinstall torch"
        )
    return ok(f"{torch.__version__}, {torch.get_num_threads()} threads")


def check_cuda() -> Finding:
    """A product on the card in 16 bits, where there is one."""
    import torch

    from flexlora.planning.probing import device_name, free_bytes, probe
    from flexlora.training.models import pick_device

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            return warning(
                "there is an NVIDIA driver, and torch sees no card: training runs on the CPU.",
                "pip install --force-reinstall torch (a CUDA build)",
            )
        return ok("no NVIDIA card: training runs on the CPU")
    device = pick_device("cuda")
    error = probe(device).error("bf16")
    if error:
        return warning(f"a bfloat16 product fails: {error}", "set model.dtype=float32")
    return ok(f"{device_name(device)}, {free_bytes(device) / 2**30:.1f} GiB free")


def check_bitsandbytes() -> Finding:
    """NF4 and 8-bit bases, forward and backward, and 8-bit AdamW, where training would run."""
    from flexlora.planning.probing import probe
    from flexlora.training.models import pick_device

    device = pick_device("auto")
    names = ("nf4", "8bit", "adamw_8bit")
    errors = {name: error for name in names if (error := probe(device).error(name))}
    if errors:
        lost = [
            *(["quantized bases cannot be trained"] if errors.keys() - {"adamw_8bit"} else []),
            *(["8-bit optimizers cannot step"] if "adamw_8bit" in errors else []),
        ]
        spelled = "; ".join(f"{name}: {error.rstrip('.')}" for name, error in errors.items())
        return warning(
            f"{' and '.join(lost)} on {device.type}: {spelled}.",
            "pip install --upgrade 'bitsandbytes>=0.50'",
        )
    return ok(f"nf4 and 8bit train and adamw_8bit steps on {device.type}")


def check_training() -> Finding:
    """Two steps of local training on the embedded base."""
    from flexlora.aggregation.engine.starts import Start
    from flexlora.algebra.linalg import live_rows
    from flexlora.data.collation import Example
    from flexlora.lora.adapters import Adapter, LoRAFactors
    from flexlora.lora.ranks import RankClass
    from flexlora.seeds import generator
    from flexlora.training.local import TrainSettings, train
    from flexlora.training.models import load_base
    from flexlora.training.slots import SlotModel
    from flexlora.wire.jobs import TrainJob

    base = load_base("embedded", fresh=True)
    slots = SlotModel(base.model)
    factors = {}
    for name, (out, width) in slots.shapes.items():
        A = live_rows(2, width, generator(0, "doctor", name)).float()
        factors[name] = LoRAFactors(lora_A=A, lora_B=A.new_zeros(out, 2), alpha=16.0)
    start = Start(rank_class=RankClass.of(2), base_round=0, trained=Adapter(factors)).sealed()
    job = TrainJob(client_id="doctor", server_round=1, num_server_rounds=1, start=start)
    rows = [Example(input_ids=(1, 5, 6, 7, 8, 9), prompt_length=3, prompt="", answer="")]
    result = train(slots, [job], [rows], TrainSettings(learning_rate=0.01, max_steps=2))[0]
    losses = f"{result.loss_before:.2f} to {result.loss_after:.2f}"
    if not result.loss_after < result.loss_before:
        return failed(
            f"two steps of training take the loss from {losses}: not down.",
            "flexlora simulate --config simulations/scenarios/smoke.toml",
        )
    return ok(f"two steps on {base.device.type}: loss {losses}")


def check_disk(folder: Path) -> Finding:
    """Write, flush, rename and read back where runs go, as a checkpoint does."""
    where = folder.resolve()
    while not where.exists():
        where = where.parent
    free = shutil.disk_usage(where).free
    try:
        with tempfile.TemporaryDirectory(dir=where, prefix=".flexlora-doctor-") as made:
            path = Path(made) / "written"
            write_atomically(path, b"flexlora")
            intact = path.read_bytes() == b"flexlora"
    except OSError as error:
        reason = error.strerror or str(error)
        return failed(f"'{where}' cannot be written to: {reason}.", f"chmod u+rwx '{where}'")
    if not intact:
        return failed(f"'{where}' gives back other bytes than were written.", "dmesg | tail")
    if free < SMALL_DISK:
        message = f"'{where}' has {free / 2**20:.0f} MiB free; checkpoints of large runs need more."
        return warning(message, "flexlora simulate --out DIR (on another disk)")
    return ok(f"{free / 2**30:.1f} GiB free in {where}")


def check_ports() -> Finding:
    """A byte over a loopback connection, as between Flower's processes on one node."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
                accepted, _ = server.accept()
                with accepted:
                    client.sendall(b"x")
                    got = accepted.recv(1)
    except OSError as error:
        reason = error.strerror or str(error)
        return warning(f"loopback connections fail: {reason}.", "ip link set lo up")
    if got != b"x":
        return warning("a loopback connection lost what was sent.", "ip link set lo up")
    return ok("loopback connections work")


CHECKS: tuple[Check, ...] = (
    ("python", check_python),
    ("torch", check_torch),
    ("cuda", check_cuda),
    ("bitsandbytes", check_bitsandbytes),
    ("training", check_training),
    ("disk", lambda: check_disk(Path("runs"))),
    ("ports", check_ports),
)


def check_format(format: str) -> None:
    """Raises ``UserError`` for a format that ``report`` does not know."""
    if format not in FORMATS:
        known = ", ".join(FORMATS)
        raise UserError(
            f"--format is '{format}', expected one of {known}.{nearest(format, FORMATS)}"
        )


def report(findings: Sequence[Finding], *, format: str = "text") -> int:
    """Print the findings; 1 where one failed, 0 otherwise."""
    check_format(format)
    broken = any(finding.status == "failed" for finding in findings)
    if format == "json":
        print(json.dumps({"ok": not broken, "findings": [asdict(f) for f in findings]}, indent=1))
    else:
        _print_table(findings)
    return int(broken)


def _print_table(findings: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table

    console: Any = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=120)
    table = Table(box=None, pad_edge=False)
    for column in ("check", "", "what was seen"):
        table.add_column(column, overflow="fold")
    styles = {"ok": "green", "warning": "yellow", "failed": "bold red"}
    for finding in findings:
        message = finding.message + (f"\nremedy: {finding.remedy}" if finding.remedy else "")
        table.add_row(finding.name, finding.status, message, style=styles[finding.status])
    console.print(table)
