"""``flexlora serve`` and ``flexlora chat``: adapters at work."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Option

from flexlora.commands.options import PATH
from flexlora.commands.train import Sets
from flexlora.errors import UserError
from flexlora.units import parse_bytes

__all__ = ["chat", "serve"]

Base = Annotated[
    str, Option(metavar="MODEL", click_type=PATH, help="base (default: the one they name)")
]


def serve(
    targets: Annotated[
        list[str] | None,
        Argument(
            metavar="[ADAPTER_OR_RUN]...",
            click_type=PATH,
            help="PEFT or run folders; NAME=DIR names one",
        ),
    ] = None,
    base: Base = "",
    follow: Annotated[
        str,
        Option(metavar="RUN", click_type=PATH, help="serve a run in progress as its rounds close"),
    ] = "",
    host: Annotated[str, Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, Option(help="0: a free one")] = 8000,
    api_key: Annotated[
        str,
        Option(envvar="FLEXLORA_API_KEY", help="what clients must send; better as variable"),
    ] = "",
    allow_loading: Annotated[
        str,
        Option(metavar="DIR", click_type=PATH, help="clients may load adapters from below DIR"),
    ] = "",
    max_running: Annotated[int, Option(metavar="N", help="requests in one pass")] = 64,
    max_waiting: Annotated[int, Option(metavar="N", help="requests in the queue")] = 256,
    max_length: Annotated[
        int, Option(metavar="TOKENS", help="of prompt and answer (0: what the model takes)")
    ] = 0,
    cache: Annotated[str, Option(metavar="SIZE", help="bytes of keys and values")] = "1GiB",
    adapter_memory: Annotated[
        str, Option(metavar="SIZE", help="bytes of adapters on the device")
    ] = "1GiB",
    timeout: Annotated[float, Option(help="seconds that an answer may take")] = 600.0,
    grace: Annotated[float, Option(help="seconds to finish in at a stop")] = 30.0,
    sets: Sets = None,
) -> int:
    for flag, value in {"--timeout": timeout, "--grace": grace}.items():
        if not 0 <= value < float("inf") or (flag == "--timeout" and not value):
            raise UserError(f"{flag} is {value:g}, expected a number of seconds.")
    from flexlora.report.console import make_console
    from flexlora.serving.limits import Limits
    from flexlora.simulations.serving import Address, serve

    return serve(
        targets or (),
        address=Address(host=host, port=port, api_key=api_key),
        limits=Limits(
            max_running=max_running,
            max_waiting=max_waiting,
            max_length=max_length,
            cache_bytes=parse_bytes(cache, "--cache"),
        ),
        base=base,
        sets=sets or (),
        follow=follow,
        loading=allow_loading,
        adapter_bytes=parse_bytes(adapter_memory, "--adapter-memory"),
        call_seconds=timeout,
        grace_seconds=grace,
        console=make_console(),
    )


def chat(
    targets: Annotated[
        list[str],
        Argument(
            metavar="ADAPTER_OR_RUN...",
            click_type=PATH,
            help="PEFT or run folders; NAME=DIR names one",
        ),
    ],
    base: Base = "",
    adapter: Annotated[
        str, Option(metavar="NAME", help="to begin with (default: the run's global one, the first)")
    ] = "",
    max_tokens: Annotated[int, Option(metavar="N", help="tokens of an answer")] = 256,
    temperature: Annotated[float, Option(help="0: the likeliest token each time")] = 0.0,
    seed: Annotated[int, Option(help="of answers with a temperature")] = 0,
    sets: Sets = None,
) -> int:
    from flexlora.report.console import make_console
    from flexlora.serving.requests import Sampling
    from flexlora.simulations.chatting import chat

    return chat(
        targets,
        base=base,
        adapter=adapter,
        sampling=Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed),
        sets=sets or (),
        console=make_console(),
    )
