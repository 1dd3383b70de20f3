"""``flexlora fleet invite``: a token by which nodes join."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Annotated

from cryptography.hazmat.primitives.serialization import Encoding
from typer import Argument, Option

from flexlora.commands.options import PATH
from flexlora.deploy.hosts import parse_name, parse_superlink
from flexlora.deploy.invitation import Token
from flexlora.errors import UserError
from flexlora.server.fleet.certificates import signer_of
from flexlora.server.fleet.invitations import KEPT_DAYS, Invitation, Invitations
from flexlora.server.fleet.operations import table_path
from flexlora.server.fleet.table import FleetTable, changing, moment

__all__ = ["fleet_invite"]

MOST_HOURS, MOST_NODES = 24 * 30, 10_000


def fleet_invite(
    name: Annotated[str, Argument(metavar="NAME", help="the only name that may come")] = "",
    hours: Annotated[int, Option(help="that the token is good for")] = 24,
    count: Annotated[int, Option(help="how many nodes it lets in")] = 1,
    approve: Annotated[
        bool, Option("--approve", help="let them in at once, without `flexlora fleet add NAME`")
    ] = False,
    address: Annotated[
        str, Option(metavar="HOST:PORT", help="of this server (default: as it was made)")
    ] = "",
    server: Annotated[
        str, Option(metavar="DIR", click_type=PATH, help="the server's folder (default: this one)")
    ] = ".",
) -> None:
    """Print a token for `flexlora client enroll`.

    Raises:
        UserError: hours or a count out of range, a name that is taken, a folder without a proxy.
    """
    folder = Path(server).resolve()
    path = table_path(folder)
    if not 1 <= hours <= MOST_HOURS:
        raise UserError(f"--hours is {hours}, expected 1 to {MOST_HOURS}.")
    if not 1 <= count <= MOST_NODES:
        raise UserError(f"--count is {count}, expected 1 to {MOST_NODES}.")
    if name and count > 1:
        raise UserError(f"NAME is '{name}' and --count {count}, expected one node for a name.")
    if name and parse_name(name, "NAME") in FleetTable.read(path).nodes:
        raise UserError(
            f"'{name}' is in the fleet already; `flexlora fleet rotate {name} KEY.pub` gives it a "
            "new key, and a revoked one comes back with `flexlora fleet add`."
        )
    superlink = parse_superlink(address or _address(folder), "--address")
    authority = sha256(signer_of(folder).public_bytes(Encoding.DER)).digest()
    token = Token.make(superlink, authority)
    now = datetime.now(UTC)
    invitation = Invitation(
        id=token.invitation,
        secret_digest=token.secret_digest,
        made=moment(now),
        expires=moment(now + timedelta(hours=hours)),
        name=name,
        count=count,
        approve=approve,
    )
    with changing(path):
        Invitations(folder).put(invitation, oldest=moment(now - timedelta(days=KEPT_DAYS)))
    print(token)


def _address(folder: Path) -> str:
    """Where nodes reach this server, from ``environment``."""
    if not (folder / "nginx").is_dir():
        raise UserError(
            "this folder has no proxy, and nodes enrol through it; bring their public keys here "
            "and use `flexlora fleet add NAME KEY.pub`."
        )
    lines = (folder / "environment").read_text(encoding="utf-8").splitlines()
    found = [line.partition("=")[2] for line in lines if line.startswith("FLEXLORA_ADDRESS=")]
    if not found:
        raise UserError("this folder was made by an older FlexLoRA; give --address HOST:PORT.")
    return found[0]
