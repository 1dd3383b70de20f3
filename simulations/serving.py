"""``flexlora serve``: one base and many adapters behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import json
import logging
import shlex
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from flexlora.clients.trainer.command import stop_signals
from flexlora.config.paths import resolve_name
from flexlora.errors import RunFailed, UserError, one_line
from flexlora.lora.peft_config import read_config
from flexlora.lora.peft_folder import load_adapter
from flexlora.lora.runtimes import vllm_max_rank
from flexlora.serving.api.app import make_app
from flexlora.serving.api.front import Front, bind, hosts_of, is_loopback
from flexlora.serving.api.loading import Loading
from flexlora.serving.api.service import Service, ServiceLimits
from flexlora.serving.api.token_bytes import TokenBytes
from flexlora.serving.engine import Engine
from flexlora.serving.limits import Limits
from flexlora.simulations.served_adapters import PERSONAL, FollowedRun
from flexlora.simulations.serving_targets import Served, Target, open_served, target_of

__all__ = ["Address", "default_model", "folders_of", "serve", "vllm_command"]

LOG = logging.getLogger(__name__)
POLL_SECONDS = 1.0  # between two looks at a followed run
SHOWN = 12  # names of models that are printed


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where to listen, and who may ask.

    Raises:
        UserError: an address that other machines reach without a key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        if not is_loopback(self.host) and not self.api_key:
            raise UserError(
                f"--host is '{self.host}', which other machines reach, and there is no key; set "
                "FLEXLORA_API_KEY (or --api-key), or serve on 127.0.0.1 behind a proxy."
            )


def serve(
    texts: Sequence[str],
    *,
    address: Address,
    limits: Limits,
    base: str = "",
    sets: Sequence[str] = (),
    follow: str = "",
    loading: str = "",
    adapter_bytes: int = 2**30,
    call_seconds: float = 600.0,
    grace_seconds: float = 30.0,
    console: Console,
) -> int:
    """Serve until SIGTERM or Ctrl-C.

    The exit status is 0 where calls in progress ended within ``grace_seconds``, 1 where they were
    cut.

    Raises:
        UserError: as ``open_served`` and ``bind``; nothing to serve; a folder that is none.
        RunFailed: the engine has failed.
    """
    targets = [target_of(text) for text in texts]
    followed = _followed(follow)
    if not targets and followed is None and not base:
        raise UserError("nothing to serve: give a run or a PEFT folder, --follow RUN or --base.")
    if loading and not Path(loading).is_dir():
        raise UserError(f"--allow-loading is '{loading}', which is no folder.")
    listening = bind(address.host, address.port)  # before the base is loaded
    try:
        served = open_served(
            targets, base=base, sets=sets, follow=followed, adapter_bytes=adapter_bytes
        )
        engine = Engine(served.base, served.store, limits)
    except BaseException:
        listening.close()
        raise
    service = Service(
        engine,
        served.store,
        served.prompts,
        TokenBytes(served.base.tokenizer),
        base_name=served.base_name,
        limits=ServiceLimits(call_seconds=call_seconds),
    )
    open_to_all = is_loopback(address.host) and not address.api_key
    front = Front(
        service,
        make_app(service, Loading(served.store, loading) if loading else None),
        listening,
        api_key=address.api_key,
        hosts=hosts_of(address.host) if open_to_all else None,
    )
    with stop_signals() as signals:
        front.start()
        for line in _banner(served, front.url, targets, keyed=bool(address.api_key)):
            console.print(line, soft_wrap=True)
        with _following(served, console):
            while front.alive and not signals.stop.wait(0.2):
                continue
        failed = service.failure or ("" if signals.stop.is_set() else "the HTTP server has ended")
        if not failed:
            console.print(f"stopping: {service.calls} calls have {grace_seconds:g} s to end")
        calm = front.stop(0 if failed else grace_seconds, signals.now.is_set)
    if failed:
        raise RunFailed(f"serving has failed: {failed}")
    console.print("stopped" if calm else "stopped: calls in progress were cut")
    return 0 if calm else 1


def _followed(text: str) -> Target | None:
    found = target_of(text) if text else None
    if found is not None and not found.is_run:
        raise UserError(f"--follow is '{found.path}', which is no run folder.")
    return found


@contextmanager
def _following(served: Served, console: Console) -> Iterator[None]:
    """Look for new rounds of a followed run while the block lasts."""
    stop = threading.Event()
    if served.followed is None:
        yield
        return
    followed = served.followed
    thread = threading.Thread(
        target=_follow, args=(followed, stop, console.print), name="follow", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(POLL_SECONDS)


def _follow(followed: FollowedRun, stop: threading.Event, say: Callable[[str], None]) -> None:
    said = ""
    while not stop.wait(POLL_SECONDS):
        said = _poll(followed, said, say)


def _poll(followed: FollowedRun, said: str, say: Callable[[str], None]) -> str:
    """Serve a new round where there is one; the cause that was said, empty where all is well.

    What cannot be read is said once, and tried again: the last good round stays.
    """
    try:
        found = followed.poll()
    except Exception as error:  # a run that is moved, deleted or damaged meanwhile
        if one_line(error) != said:
            say(f"{followed.path} is not followed at the moment: {one_line(error)}")
        return one_line(error)
    if found is not None:
        say(f"{time.strftime('%H:%M:%S')} round {found} of {followed.path} is served")
    return ""


def _banner(served: Served, url: str, targets: Sequence[Target], *, keyed: bool) -> Iterator[str]:
    names = served.store.names()
    shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" * (len(names) > SHOWN))
    yield f"base      {served.base_name} on {served.base.device}"
    yield f"adapters  {shown or 'none yet'}"
    if served.followed is not None:
        done = served.followed.server_round
        at = "no round is finished yet" if done is None else f"round {done}"
        yield f"follows   {served.followed.path}: {at}"
    yield f"address   {url}/v1"
    body = {
        "model": default_model(served),
        "messages": [{"role": "user", "content": "Reverse the word: stone"}],
    }
    key = " -H 'Authorization: Bearer '\"$FLEXLORA_API_KEY\"" if keyed else ""
    yield (
        f"try       curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} "
        f"-d {shlex.quote(json.dumps(body))}"
    )
    command = vllm_command(served.base.name, folders_of(targets))
    if command:
        yield f"vLLM      {command}"


def default_model(served: Served) -> str:
    """A run's global adapter, else the first that is no single client's, else the base."""
    names = served.store.names()
    shared = [name for name in names if not name.startswith(PERSONAL)]
    return "global" if "global" in names else next(iter(shared or names), served.base_name)


def folders_of(targets: Sequence[Target]) -> dict[str, Path]:
    """The PEFT folders behind the served names; a single client's adapters have none."""
    found = {}
    for target in targets:
        if not target.is_run:
            found[target.adapter_name] = target.path
            continue
        written = sorted((target.path / "adapters").glob("*/adapter_config.json"))
        found |= {f"{target.prefix}{file.parent.name}": file.parent for file in written}
    return found


def vllm_command(base: str, folders: dict[str, Path]) -> str:
    """The command with which vLLM serves the same folders; empty where there are none.

    A rank above what it takes is a comment instead.
    """
    if not folders:
        return ""
    rank = max(map(_largest_rank, folders.values()))
    allowed = vllm_max_rank(rank)
    if allowed is None:
        return f"# rank {rank} is above what vLLM takes; `flexlora export --rank` writes a smaller"
    modules = [f"{name}={path.resolve()}" for name, path in folders.items()]
    words = ["vllm", "serve", resolve_name(base), "--enable-lora"]
    words += ["--max-loras", str(min(len(modules), 8)), "--max-lora-rank", str(allowed)]
    return shlex.join([*words, "--lora-modules", *modules])


def _largest_rank(folder: Path) -> int:
    config = read_config(folder / "adapter_config.json")
    return max(config.rank_of(module) for module in load_adapter(folder))
