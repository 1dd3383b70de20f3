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
from typing import Any

from flexlora.clients.trainer.sockets import (
    check_folder,
    check_free,
    default_socket,
    group_number,
    remove,
)
from flexlora.errors import UserError

__all__ = ["ServeOptions", "health_command", "serve"]

ABORTED = 1
ONE_WISH = 1.0  # seconds


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """The command line of ``serve``; "" is what was not given."""

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

    0 if what was in flight could end within ``--grace`` seconds, 1 if it was aborted.

    Raises:
        UserError: whatever a person mistyped, a socket that is taken, a model that does not fit.
    """
    path = _checked_socket(options)  # before anything heavy is loaded

    from flexlora.clients.trainer.service import TrainerService, listen, stop
    from flexlora.clients.trainer.telling import Teller

    limits = _limits(options)
    with Teller(_console()) as teller, stop_signals() as signals:
        trainer = _trainer(options, teller)
        service = TrainerService(trainer, limits=limits, teller=teller)
        try:
            server = listen(service, path, options.group)
            server.start()
        except UserError:
            trainer.close()
            raise
        teller.line(_ready(trainer, path))
        signals.stop.wait()
        teller.line(f"stopping: what is in flight has {options.grace:g} s to end")
        ended = _stop(lambda: stop(service, server, path, options.grace), signals.now)
        teller.line("stopped" if ended else "stopped: what was in flight is aborted")
    if not ended:
        remove(path)
        sys.stdout.flush()
        os._exit(ABORTED)  # the training's thread cannot be ended, and would hold the process
    return 0


def health_command(socket: str) -> int:
    """Print how the trainer is; exit status 1 where it is stopping.

    Raises:
        UserError: no trainer there.
    """
    from flexlora.clients.trainer.client import health
    from flexlora.units import human_bytes

    told = health(_socket(socket))
    doing = f"{told.doing}, for {told.seconds:.0f} s" if told.doing else "idle"
    lines = {
        "now": "stopping" if told.stopping else doing,
        "version": told.version,
        "base": f"{told.model}, {told.quantization}, fingerprint {told.fingerprint}",
        "device": f"{told.device}, {human_bytes(told.free_bytes)} for a training and its base",
        "runs": ", ".join(told.runs) or "no kernel",
        "absent": "; ".join(told.absent) or "no kernel",
        "done": f"{told.trained} trained, {told.evaluated} evaluated, {told.from_disk} from disk",
        "kept": f"{told.kept_files} replies, {human_bytes(told.kept_bytes)}",
    }
    for name, text in lines.items():
        print(f"{name:<8} {text}")
    return 1 if told.stopping else 0


def _socket(given: str) -> Path:
    return Path(os.path.abspath(Path(given).expanduser())) if given else default_socket()


def _checked_socket(options: ServeOptions) -> Path:
    """The socket's path, free and in a folder that is safe."""
    path = _socket(options.socket)
    check_folder(path)
    check_free(path)
    if options.group:
        group_number(options.group)
    return path


def _limits(options: ServeOptions) -> Any:
    from flexlora.clients.trainer.service import Limits

    named = {"--keep-hours": options.keep_hours, "--wait": options.wait, "--grace": options.grace}
    for flag, value in named.items():
        if not value >= 0:
            raise UserError(f"{flag} is {value:g}, expected 0 or more.")
    largest = _size(options.max_request, "--max-request")
    return Limits(request_bytes=largest, wait_seconds=options.wait)


def _console() -> Any:
    from rich.console import Console

    return Console(highlight=False, markup=False)


def _size(text: str, flag: str) -> int:
    from flexlora.clients.trainer.allowance import parse_size

    return parse_size(text, flag)


def _trainer(options: ServeOptions, teller: Any) -> Any:
    """The trainer with its base loaded; what does not fit the memory limit is not loaded."""
    from flexlora.clients.trainer.allowance import enforce, smallest_plan
    from flexlora.clients.trainer.node import Node
    from flexlora.clients.trainer.resident import ResidentTrainer
    from flexlora.clients.trainer.store import KeptReplies, default_folder

    node = Node.of(
        model=options.model,
        data=options.data,
        quantization=options.quantization,
        device=options.device,
        client_id=options.client_id,
        sets=tuple(options.set),
    )
    limit = _size(options.memory_limit, "--memory-limit") if options.memory_limit else 0
    if limit:
        choice = smallest_plan(node.config, limit)
        teller.line(f"memory limit: a training at rank {choice.plan.rank} fits it")
        teller.line(enforce(node.config, limit))
    kept = KeptReplies(
        Path(options.state).expanduser() if options.state else default_folder(),
        max_bytes=_size(options.keep, "--keep"),
        max_seconds=options.keep_hours * 3600,
    )
    teller.line(f"loading {options.model}")
    try:
        return ResidentTrainer(node=node, kept=kept, limit_bytes=limit)
    except BaseException:
        kept.close()
        raise


def _ready(trainer: Any, path: Path) -> str:
    config = trainer.node.config
    return (
        f"ready on {path}: {config.model.name} ({config.model.quantization}) on "
        f"{trainer.device}, {trainer.num_examples} train rows, kernels "
        f"{', '.join(trainer.kernels.runs) or 'none'}"
    )


class Signals:
    """``stop`` at the first SIGTERM or Ctrl-C, ``now`` at another one a while later.

    Some who end a process send the signal to it and to its group: that is one wish, not two.
    """

    def __init__(self) -> None:
        self.stop, self.now = threading.Event(), threading.Event()
        self._first = 0.0

    def __call__(self, *_: object) -> None:
        if not self.stop.is_set():
            self._first = time.monotonic()
            self.stop.set()
        elif time.monotonic() - self._first > ONE_WISH:
            self.now.set()


@contextmanager
def stop_signals() -> Iterator[Signals]:
    """What SIGTERM and Ctrl-C set, for as long as the block lasts."""
    signals = Signals()
    wanted = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, signals) for number in wanted}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(stopping: Callable[[], bool], again: threading.Event) -> bool:
    """Whether ``stopping()`` says that all has ended; a second signal does not wait for it."""
    answer: list[bool] = []
    thread = threading.Thread(target=lambda: answer.append(stopping()), daemon=True)
    thread.start()
    while thread.is_alive() and not again.wait(0.1):
        continue
    return bool(answer and answer[0])
