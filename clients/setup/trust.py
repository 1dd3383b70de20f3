"""``flexlora client trust``: fetch the server's current authorities over a connection trusted now.

While a server changes its authority, its ``ca.crt`` has the old and the new one.
"""

from __future__ import annotations

import http.client
import ssl
import tempfile
from pathlib import Path
from typing import Annotated

from typer import Option

from flexlora.commands.options import PATH
from flexlora.deploy.certificates import read_authorities
from flexlora.deploy.connections import Link, reason
from flexlora.deploy.hosts import parse_superlink
from flexlora.deploy.invitation import AUTHORITY_PATH
from flexlora.errors import UserError
from flexlora.wire.files import write_atomically

__all__ = ["trust"]


def trust(
    superlink: Annotated[str, Option(metavar="HOST:PORT", help="the server")],
    root_certificates: Annotated[
        str, Option(metavar="CA.crt", click_type=PATH, help="the node's ca.crt, which is replaced")
    ],
) -> None:
    """Replace the node's ``ca.crt`` by the server's.

    Raises:
        UserError: the server is not the one that ``ca.crt`` vouches for, or serves none.
    """
    file = Path(root_certificates)
    address = parse_superlink(superlink, "--superlink")
    before = read_authorities(file)
    link = Link(host=address.host.text, port=address.port, context=before.context())
    try:
        response = link.request("GET", AUTHORITY_PATH)
    except ssl.SSLCertVerificationError as error:
        raise UserError(
            f"{address} shows a certificate that '{file}' does not vouch for "
            f"({error.verify_message}); ask the server's owner for its ca.crt."
        ) from None
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{address} gives no certificates: {reason(error)}.") from None
    if response.status != 200:
        raise UserError(
            f"{address} answers {response.status} for {AUTHORITY_PATH}; does its enrolment run "
            "(bin/start-enrolment)?"
        )
    with tempfile.NamedTemporaryFile(suffix=".crt") as given:
        given.write(response.body)
        given.flush()
        after = read_authorities(Path(given.name))
    if after.pem == before.pem:
        print(f"{file} is the server's already: {len(after.certificates)} authorities.")
        return
    write_atomically(file, after.pem)
    ends = ", ".join(f"{each.not_valid_after_utc:%Y-%m-%d}" for each in after.certificates)
    print(f"{file} is new: {len(after.certificates)} authorities, until {ends}.")
    print("Restart the SuperNode, which has read the old one.")
