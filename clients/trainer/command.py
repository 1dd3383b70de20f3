"""``flexlora client serve`` and ``flexlora client health``."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flexlora.clients.trainer.sockets import (
    check_folder,
    check_free,
    default_socket,
    group_number,
    remove,
)
from flexlora.errors import UserError
from flexlora.units import human_bytes, parse_bytes

if TYPE_CHECKING:
    from flexlora.clients.trainer.activity_log import ActivityLog
    from flexlora.clients.trainer.resident import ResidentTrainer

__all__ = ["ServeOptions", "health_command", "serve"]

ABORTED = 1
SAME_SIGNAL_SECONDS = 1.0  # some senders signal a process and then its group


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """The command line of ``serve``; "" means not given."""

    model: str
    data: str
    socket: str = ""
    group: str = ""
    client_id: str = ""
    quantization: str = "none"
    device: str = "auto"
    set: tuple[str, ...] | list[str] = ()
    memory_limit: str = ""
    state: str = ""
    keep: str = "2GiB"
    keep_hours: float = 24.0
    max_request: str = "2GiB"
    wait: float = 600.0
    grace: float = 120.0


def serve(options: ServeOptions) -> int:
    """Load the base, listen, and work until SIGTERM or Ctrl-C; the exit status.

    0 if the running request ended within ``--grace`` seconds, 1 if it was aborted.

    Raises:
        UserError: a mistyped option, a socket that is in use, a model that does not fit.
    """
    path = _checked_socket(options)  # before anything heavy is loaded

    from rich.console import Console

    from flexlora.clients.trainer.activity_log import ActivityLog
    from flexlora.clients.trainer.service import Limits, TrainerService, listen, stop

    _check_times(options)
    largest = parse_bytes(options.max_request, "--max-request")
    limits = Limits(request_bytes=largest, wait_seconds=options.wait)
    console = Console(highlight=False, markup=False)
    with ActivityLog(console) as log, stop_signals() as signals:
        trainer = _trainer(options, log)
        service = TrainerService(trainer, limits=limits, log=log)
        try:
            server = listen(service, path, options.group)
            server.start()
        except UserError:
            trainer.close()
            raise
        log.line(_ready(trainer, path))
        signals.stop.wait()
        log.line(f"stopping: what is in flight has {options.grace:g} s to end")
        ended = _stop(lambda: stop(service, server, path, options.grace), signals.now)
        log.line("stopped" if ended else "stopped: what was in flight is aborted")
    if not ended:
        remove(path)
        sys.stdout.flush()
        os._exit(ABORTED)  # the training's thread cannot be ended, and would hold the process
    return 0


def health_command(socket: str) -> int:
    """Print the trainer's state; exit status 1 if it is stopping.

    Raises:
        UserError: no trainer on the socket.
    """
    from flexlora.clients.trainer.client import health

    state = health(_socket(socket))
    doing = f"{state.doing}, for {state.seconds:.0f} s" if state.doing else "idle"
    lines = {
        "now": "stopping" if state.stopping else doing,
        "version": state.version,
        "base": f"{state.model}, {state.quantization}, fingerprint {state.fingerprint}",
        "device": f"{state.device}, {human_bytes(state.free_bytes)} for a training and its base",
        "runs": ", ".join(state.runs) or "no kernel",
        "absent": "; ".join(state.absent) or "no kernel",
        "done": f"{state.trained} trained, {state.evaluated} evaluated, "
        f"{state.from_disk} from disk",
        "kept": f"{state.kept_files} replies, {human_bytes(state.kept_bytes)}",
    }
    for name, text in lines.items():
        print(f"{name:<8} {text}")
    return 1 if state.stopping else 0


def _socket(given: str) -> Path:
    return Path(os.path.abspath(Path(given).expanduser())) if given else default_socket()


def _checked_socket(options: ServeOptions) -> Path:
    """The socket's path, unused and in a safe folder."""
    path = _socket(options.socket)
    check_folder(path)
    check_free(path)
    if options.group:
        group_number(options.group)
    return path


def _check_times(options: ServeOptions) -> None:
    named = {"--keep-hours": options.keep_hours, "--wait": options.wait, "--grace": options.grace}
    for flag, value in named.items():
        if not value >= 0:
            raise UserError(f"{flag} is {value:g}, expected 0 or more.")


def _trainer(options: ServeOptions, log: ActivityLog) -> ResidentTrainer:
    """The trainer with its base loaded, once the memory limit allows some training."""
    from flexlora.clients.trainer.memory_limit import enforce, smallest_plan
    from flexlora.clients.trainer.owner_config import OwnerConfig
    from flexlora.clients.trainer.reply_store import ReplyStore, default_folder
    from flexlora.clients.trainer.resident import ResidentTrainer

    owner = OwnerConfig.of(
        model=options.model,
        data=options.data,
        quantization=options.quantization,
        device=options.device,
        client_id=options.client_id,
        sets=tuple(options.set),
    )
    limit = parse_bytes(options.memory_limit, "--memory-limit") if options.memory_limit else 0
    if limit:
        choice = smallest_plan(owner.config, limit)
        log.line(f"memory limit: a training at rank {choice.plan.rank} fits it")
        log.line(enforce(owner.config, limit))
    replies = ReplyStore(
        Path(options.state).expanduser() if options.state else default_folder(),
        max_bytes=parse_bytes(options.keep, "--keep"),
        max_seconds=options.keep_hours * 3600,
    )
    log.line(f"loading {options.model}")
    try:
        return ResidentTrainer(owner=owner, replies=replies, limit_bytes=limit)
    except BaseException:
        replies.close()
        raise


def _ready(trainer: ResidentTrainer, path: Path) -> str:
    config = trainer.owner.config
    return (
        f"ready on {path}: {config.model.name} ({config.model.quantization}) on "
        f"{trainer.device}, {trainer.num_examples} train rows, kernels "
        f"{', '.join(trainer.kernels.runs) or 'none'}"
    )


class Signals:
    """Sets ``stop`` at the first SIGTERM or Ctrl-C, and ``now`` at a later one."""

    def __init__(self) -> None:
        self.stop, self.now = threading.Event(), threading.Event()
        self._first = 0.0

    def __call__(self, *_: object) -> None:
        if not self.stop.is_set():
            self._first = time.monotonic()
            self.stop.set()
        elif time.monotonic() - self._first > SAME_SIGNAL_SECONDS:
            self.now.set()


@contextmanager
def stop_signals() -> Iterator[Signals]:
    """Handle SIGTERM and Ctrl-C for as long as the block lasts."""
    signals = Signals()
    handled = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, signals) for number in handled}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(stopping: Callable[[], bool], now: threading.Event) -> bool:
    """The result of ``stopping()``, False as soon as ``now`` is set."""
    ended: list[bool] = []
    thread = threading.Thread(target=lambda: ended.append(stopping()), daemon=True)
    thread.start()
    while thread.is_alive() and not now.wait(0.1):
        continue
    return bool(ended and ended[0])
