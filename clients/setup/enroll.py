"""``flexlora client enroll TOKEN DIR``: join a federation with one command.

Checks the token at the server, makes the node's folder (``init.py``), sends its public key, waits
until the server's owner has let it in, and starts the node. Interrupted or refused, it goes on with
the folder that is there when it is called again.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from flexlora.clients.setup.first_contact import NotNow, ask, fetch_authority
from flexlora.clients.setup.init import make_node
from flexlora.clients.setup.start_node import start_node
from flexlora.commands.options import PATH
from flexlora.deploy.invitation import ADMITTED, Token
from flexlora.errors import UserError
from flexlora.units import human_seconds
from flexlora.wire.files import write_atomically

__all__ = ["client_enroll", "enrol_key"]

SHORTEST, LONGEST = 2.0, 30.0  # seconds between two questions whether the node is in
MOST_HOURS = 24.0 * 7


def client_enroll(
    token: Annotated[str, Argument(metavar="TOKEN", help="of `flexlora fleet invite`; - reads it")],
    folder: Annotated[
        str, Argument(metavar="DIR", click_type=PATH, help="folder to make, or to go on with")
    ],
    data: Annotated[str, Option(metavar="DIR", click_type=PATH, help="this node's data folder")],
    model: Annotated[str, Option(click_type=PATH, help="folder or hub name")] = "embedded",
    client_id: Annotated[str, Option(metavar="NAME", help="this node's name")] = "",
    device: Annotated[str, Option(help="auto, cpu or cuda")] = "auto",
    quantization: Annotated[str, Option(help="none, 8bit or nf4 (default: what fits)")] = "",
    memory_limit: Annotated[str, Option(metavar="SIZE", help="bytes to use, like 6GiB")] = "",
    port: Annotated[int, Option(help="of this node on loopback")] = 9094,
    wait_hours: Annotated[float, Option(help="for the server's owner to let it in")] = 24.0,
    start: Annotated[bool, Option(help="start the node's processes at the end")] = True,
) -> None:
    """Join the federation that the token names.

    Raises:
        UserError: a damaged, expired, used or unknown token, another server than it names, a name
            that is taken, what ``flexlora client init`` refuses, or no approval in time.
        RunFailed: a process of the node does not start.
    """
    if not 0 <= wait_hours <= MOST_HOURS:
        raise UserError(f"--wait-hours is {wait_hours:g}, expected 0 to {MOST_HOURS:g}.")
    invited = Token.parse(sys.stdin.readline() if token == "-" else token)
    path = Path(folder).resolve()
    authority = fetch_authority(invited)
    if not (path / "keys" / "node.pub").is_file():
        welcome = ask(invited, authority, name=client_id)
        with tempfile.NamedTemporaryFile(suffix=".crt") as trusted:
            trusted.write(authority)
            trusted.flush()
            make_node(
                folder=folder,
                superlink=str(invited.superlink),
                root_certificates=trusted.name,
                data=data,
                model=model,
                client_id=client_id or welcome.name,
                device=device,
                quantization=quantization,
                memory_limit=memory_limit,
                port=port,
            )
    enrol_key(path, invited, authority, wait_hours * 3600.0)
    if start:
        start_node(path)
        print(f"The node runs; `kill -- $(cat {path}/state/pids)` ends it. After a restart of this")
        print(f"machine it is started by systemd's units: {path}/README.md.")
    else:
        print(f"Start it: {path}/README.md.")


def enrol_key(folder: Path, token: Token, authority: bytes, wait_seconds: float) -> None:
    """Send the folder's public key and wait until it is let in; ``ca.crt`` is then the server's.

    Raises:
        UserError: it is refused, or not let in within ``wait_seconds``.
    """
    line = (folder / "keys" / "node.pub").read_text(encoding="ascii")
    name = line.split()[2]
    private = (folder / "keys" / "node").read_bytes()
    deadline, pause, said = time.monotonic() + wait_seconds, SHORTEST, ""
    while True:
        try:
            answer = ask(token, authority, name=name, public_key=line, private_key=private)
            sentence = answer.sentence
            if answer.state == ADMITTED:
                print(sentence, flush=True)
                if answer.authorities:
                    write_atomically(folder / "ca.crt", answer.authorities)
                return
        except NotNow as error:
            sentence = str(error)
        if sentence != said:
            print(sentence, flush=True)
            said = sentence
        if time.monotonic() + pause > deadline:
            raise UserError(
                f"{name} was not let in within {human_seconds(wait_seconds)}: {sentence} The same "
                "command goes on waiting."
            )
        time.sleep(pause)
        pause = min(2 * pause, LONGEST)
