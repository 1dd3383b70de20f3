"""``flexlora client serve`` and ``flexlora client health``."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from flexlora.clients.trainer.sockets import (
    check_folder,
    check_free,
    default_socket,
    group_number,
    remove,
)
from flexlora.errors import UserError

if TYPE_CHECKING:
    from flexlora.clients.trainer.node import Node
    from flexlora.clients.trainer.resident import ResidentTrainer
    from flexlora.clients.trainer.telling import Teller

__all__ = ["health", "serve"]

ABORTED = 1
ONE_WISH = 1.0  # seconds


Socket = Annotated[str, Option(metavar="PATH", help="Unix socket that the trainer listens on")]


def serve(
    model: Annotated[str, Option(help="folder, hub name, embedded")],
    data: Annotated[str, Option(metavar="DIR", help="this node's data folder")],
    socket: Socket = "",
    group: Annotated[str, Option(help="group that may open the socket too")] = "",
    client_id: Annotated[str, Option(metavar="NAME", help="this node's name")] = "",
    quantization: Annotated[str, Option(help="none, 8bit or nf4")] = "none",
    device: Annotated[str, Option(help="auto, cpu or cuda")] = "auto",
    memory_limit: Annotated[str, Option(metavar="SIZE", help="bytes to use, like 6GiB")] = "",
    state: Annotated[str, Option(metavar="DIR", help="folder of the finished replies")] = "",
    keep: Annotated[str, Option(metavar="SIZE", help="bytes of them at most")] = "2GiB",
    keep_hours: Annotated[float, Option(help="hours to keep them")] = 24.0,
    max_request: Annotated[str, Option(metavar="SIZE", help="largest request")] = "2GiB",
    wait: Annotated[float, Option(help="seconds that a request waits for its turn")] = 600.0,
    grace: Annotated[float, Option(help="seconds to finish in at a stop")] = 120.0,
    sets: Annotated[
        list[str] | None, Option("--set", metavar="KEY=VALUE", help="a model or engine key")
    ] = None,
) -> int:
    """Load the base, listen, and work until SIGTERM or Ctrl-C; the exit status.

    0 if what was in flight could end within ``--grace`` seconds, 1 if it was aborted.

    Raises:
        UserError: whatever a person mistyped, a socket that is taken, a model that does not fit.
    """
    path = _checked_socket(socket, group)  # before anything heavy is loaded

    from rich.console import Console

    from flexlora.clients.trainer.allowance import parse_size
    from flexlora.clients.trainer.node import Node
    from flexlora.clients.trainer.resident import ResidentTrainer
    from flexlora.clients.trainer.service import Limits, TrainerService, listen, stop
    from flexlora.clients.trainer.store import KeptReplies, default_folder
    from flexlora.clients.trainer.telling import Teller

    for flag, value in {"--keep-hours": keep_hours, "--wait": wait, "--grace": grace}.items():
        if not value >= 0:
            raise UserError(f"{flag} is {value:g}, expected 0 or more.")
    limits = Limits(request_bytes=parse_size(max_request, "--max-request"), wait_seconds=wait)
    with Teller(Console(highlight=False, markup=False)) as teller, stop_signals() as signals:
        node = Node.of(
            model=model,
            data=data,
            quantization=quantization,
            device=device,
            client_id=client_id,
            sets=tuple(sets or ()),
        )
        limit = _enforced(memory_limit, node, teller)
        kept = KeptReplies(
            Path(state).expanduser() if state else default_folder(),
            max_bytes=parse_size(keep, "--keep"),
            max_seconds=keep_hours * 3600,
        )
        teller.line(f"loading {model}")
        try:
            trainer = ResidentTrainer(node=node, kept=kept, limit_bytes=limit)
        except BaseException:
            kept.close()
            raise
        service = TrainerService(trainer, limits=limits, teller=teller)
        try:
            server = listen(service, path, group)
            server.start()
        except UserError:
            trainer.close()
            raise
        teller.line(_ready(trainer, path))
        signals.stop.wait()
        teller.line(f"stopping: what is in flight has {grace:g} s to end")
        ended = _stop(lambda: stop(service, server, path, grace), signals.now)
        teller.line("stopped" if ended else "stopped: what was in flight is aborted")
    if not ended:
        remove(path)
        sys.stdout.flush()
        os._exit(ABORTED)  # the training's thread cannot be ended, and would hold the process
    return 0


def health(socket: Socket = "") -> int:
    """Print how the trainer is; exit status 1 where it is stopping.

    Raises:
        UserError: no trainer there.
    """
    from flexlora.clients.trainer import client
    from flexlora.units import human_bytes

    told = client.health(_socket(socket))
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


def _checked_socket(given: str, group: str) -> Path:
    """The socket's path, free and in a folder that is safe."""
    path = _socket(given)
    check_folder(path)
    check_free(path)
    if group:
        group_number(group)
    return path


def _enforced(memory_limit: str, node: Node, teller: Teller) -> int:
    """The limit in bytes, 0 for none; what does not fit it is refused before it is loaded."""
    from flexlora.clients.trainer.allowance import enforce, parse_size, smallest_plan

    if not memory_limit:
        return 0
    limit = parse_size(memory_limit, "--memory-limit")
    choice = smallest_plan(node.config, limit)
    teller.line(f"memory limit: a training at rank {choice.plan.rank} fits it")
    teller.line(enforce(node.config, limit))
    return limit


def _ready(trainer: ResidentTrainer, path: Path) -> str:
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
