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

from flexlora.clients.trainer import sockets
from flexlora.commands.options import PATH
from flexlora.errors import UserError
from flexlora.units import human_bytes, parse_bytes

if TYPE_CHECKING:
    from flexlora.clients.trainer.activity_log import ActivityLog
    from flexlora.clients.trainer.limits import OwnerLimits
    from flexlora.clients.trainer.resident import ResidentTrainer
    from flexlora.clients.trainer.trainer_pb2 import HealthReply
    from flexlora.config.resolve import Config

__all__ = ["health", "serve"]

ABORTED = 1
SAME_SIGNAL_SECONDS = 1.0  # some senders signal a process and then its group

Socket = Annotated[str, Option(metavar="PATH", click_type=PATH, help="Unix socket of the trainer")]


def serve(
    model: Annotated[str, Option(click_type=PATH, help="folder, hub name, embedded")],
    data: Annotated[str, Option(metavar="DIR", click_type=PATH, help="this node's data folder")],
    socket: Socket = "",
    group: Annotated[str, Option(help="group that may open the socket too")] = "",
    client_id: Annotated[str, Option(metavar="NAME", help="this node's name")] = "",
    quantization: Annotated[str, Option(help="none, 8bit or nf4")] = "none",
    device: Annotated[str, Option(help="auto, cpu or cuda")] = "auto",
    limits: Annotated[
        str,
        Option(metavar="FILE", click_type=PATH, help="what a run may ask, as client init writes"),
    ] = "",
    memory_limit: Annotated[str, Option(metavar="SIZE", help="bytes to use, like 6GiB")] = "",
    state: Annotated[
        str, Option(metavar="DIR", click_type=PATH, help="folder of the finished replies")
    ] = "",
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

    0 if the running request ended within ``--grace`` seconds, 1 if it was aborted.

    Raises:
        UserError: a mistyped option, a socket that is in use, a model that does not fit.
    """
    path = _checked_socket(socket, group)  # before anything heavy is loaded

    from rich.console import Console

    from flexlora.clients.trainer.activity_log import ActivityLog
    from flexlora.clients.trainer.limits import OwnerLimits
    from flexlora.clients.trainer.owner_config import OwnerConfig
    from flexlora.clients.trainer.reply_store import ReplyStore, default_folder
    from flexlora.clients.trainer.resident import ResidentTrainer
    from flexlora.clients.trainer.service import Limits, TrainerService, listen, stop

    for flag, value in {"--keep-hours": keep_hours, "--wait": wait, "--grace": grace}.items():
        if not value >= 0:
            raise UserError(f"{flag} is {value:g}, expected 0 or more.")
    allowed = OwnerLimits.read(limits) if limits else OwnerLimits()
    received = Limits(request_bytes=parse_bytes(max_request, "--max-request"), wait_seconds=wait)
    console = Console(highlight=False, markup=False)
    with ActivityLog(console) as log, stop_signals() as signals:
        owner = OwnerConfig.of(
            model=model,
            data=data,
            quantization=quantization,
            device=device,
            client_id=client_id,
            sets=tuple(sets or ()),
        )
        limit = _enforced(_memory(memory_limit, allowed), owner.config, log)
        replies = ReplyStore(
            Path(state) if state else default_folder(),
            max_bytes=parse_bytes(keep, "--keep"),
            max_seconds=keep_hours * 3600,
        )
        log.line(f"loading {model}")
        try:
            trainer = ResidentTrainer(
                owner=owner, replies=replies, limits=allowed, limit_bytes=limit
            )
        except BaseException:
            replies.close()
            raise
        service = TrainerService(trainer, limits=received, log=log)
        try:
            server = listen(service, path, group)
            server.start()
        except UserError:
            trainer.close()
            raise
        log.line(_ready(trainer, path))
        signals.stop.wait()
        log.line(f"stopping: what is in flight has {grace:g} s to end")
        ended = _stop(lambda: stop(service, server, path, grace), signals.now)
        log.line("stopped" if ended else "stopped: what was in flight is aborted")
    if not ended:
        sockets.remove(path)
        sys.stdout.flush()
        os._exit(ABORTED)  # the training's thread cannot be ended, and would hold the process
    return 0


def health(
    socket: Socket = "",
    superlink: Annotated[
        str, Option(metavar="HOST:PORT", help="compare this machine's clock with the server's")
    ] = "",
    root_certificates: Annotated[
        str, Option(metavar="CA.crt", click_type=PATH, help="who signed the server's certificate")
    ] = "",
) -> int:
    """Print the trainer's state, the owner's limits and their use.

    The exit status is 1 if the trainer is stopping or the server would refuse this clock.

    Raises:
        UserError: no trainer on the socket, a malformed address.
    """
    from flexlora.clients.setup.clock import clock_of_server
    from flexlora.clients.trainer import client

    state = client.health(_socket(socket))
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
        "private": f"files of {state.private_runs} runs, {human_bytes(state.private_bytes)}",
        **_limits(state),
    }
    finding = clock_of_server(superlink, root_certificates) if superlink else None
    if finding is not None:
        lines["clock"] = f"{finding.status}: {finding.message}"
    for name, text in lines.items():
        print(f"{name:<8} {text}")
    return int(state.stopping or (finding is not None and finding.status == "failed"))


def _limits(state: HealthReply) -> dict[str, str]:
    """The owner's limits, a line for each section; quotas with what is used of them."""
    from flexlora.clients.trainer.content_codec import decode_entries

    lines: dict[str, list[str]] = {}
    for key, value in decode_entries(state.limits).items():
        section, _, name = key.partition(".")
        if section not in ("day", "week", "privacy") and value != "":
            text = f"{value:,g}" if isinstance(value, float) else f"{value}"
            lines.setdefault(section, []).append(f"{name} {text}")
    for quota in state.quotas:
        section, _, name = quota.key.partition(".")
        text = f"{quota.used:,.0f} of {quota.allowed:,.0f}"
        if section == "privacy":
            text = f"{quota.used:.3f} of {quota.allowed:g}"
        lines.setdefault(section, []).append(f"{name} {text}")
    return {section: ", ".join(texts) for section, texts in lines.items()}


def _socket(given: str) -> Path:
    return Path(os.path.abspath(given)) if given else sockets.default_socket()


def _checked_socket(given: str, group: str) -> Path:
    """The socket's path, unused and in a safe folder."""
    path = _socket(given)
    sockets.check_folder(path)
    sockets.check_free(path)
    if group:
        sockets.group_number(group)
    return path


def _memory(given: str, allowed: OwnerLimits) -> str:
    """The memory limit of the command line or of the file.

    Raises:
        UserError: both say it.
    """
    if given and allowed.request.memory:
        raise UserError(
            f"--memory-limit is {given} and request.memory in the limits' file is "
            f"{allowed.request.memory}; give one of them."
        )
    return given or allowed.request.memory


def _enforced(memory_limit: str, config: Config, log: ActivityLog) -> int:
    """The limit in bytes, 0 for none; a base that does not fit it is refused, not loaded."""
    from flexlora.clients.trainer.memory_limit import enforce, smallest_plan

    if not memory_limit:
        return 0
    limit = parse_bytes(memory_limit, "--memory-limit")
    choice = smallest_plan(config, limit)
    log.line(f"memory limit: a training at rank {choice.plan.rank} fits it")
    log.line(enforce(config, limit))
    return limit


def _ready(trainer: ResidentTrainer, path: Path) -> str:
    config = trainer.owner.config
    return (
        f"ready on {path}: {config.model.name} ({config.model.quantization}) on "
        f"{trainer.device}, {trainer.rows}, kernels "
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
