"""What a server answers a node that wants to join with a token: one decision for one request.

The same request may come again, after a broken connection or to hear whether an operator has let
the node in: a key that has used an invitation uses it no second time.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from flexlora.deploy.hosts import parse_name
from flexlora.deploy.invitation import ADMITTED, PENDING, REFUSED, WELCOME, signed_part
from flexlora.deploy.node_keys import PublicKey, fingerprint, parse_public_key
from flexlora.errors import UserError
from flexlora.server.fleet.invitations import (
    KEPT_DAYS,
    Invitation,
    Invitations,
    PendingNode,
    PendingNodes,
)
from flexlora.server.fleet.operations import open_fleet, table_path
from flexlora.server.fleet.table import REVOKED, FleetTable, moment

__all__ = ["Answer", "Request", "answer"]

TEXT = 4096  # characters of any value in a request
ASK_AGAIN = "ask the server's owner for a new one"


@dataclass(frozen=True, kw_only=True)
class Request:
    """A node's request as it came; without a key it only asks whether the token is good."""

    invitation: str
    secret: bytes
    name: str = ""
    public_key: str = ""
    signature: bytes = b""
    version: str = ""

    @classmethod
    def of(cls, read: object) -> Request:
        """Of a JSON body; binary values are hexadecimal.

        Raises:
            UserError: it is no such object.
        """
        try:
            if not isinstance(read, Mapping):
                raise TypeError("no object")
            values = {k: read.get(k, "") for k in cls.__dataclass_fields__}
            if not all(isinstance(v, str) and len(v) <= TEXT for v in values.values()):
                raise TypeError("a value that is no text")
            for name in ("secret", "signature"):
                values[name] = bytes.fromhex(values[name])
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise UserError(f"this is no enrolment request: {error}.") from None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """``state`` as in ``invitation.py``; ``sentence`` is for the node's owner and the log.

    ``is_new`` is false where nothing has changed since the same question was answered.
    """

    state: str
    sentence: str
    name: str = ""
    is_new: bool = True

    @classmethod
    def refused(cls, sentence: str, name: str = "") -> Answer:
        """A request that is not granted."""
        return cls(state=REFUSED, sentence=sentence, name=name)


def answer(folder: Path, request: Request, address: str) -> Answer:
    """Decide on one request that came from ``address``, and do it. One at a time in a process.

    Raises:
        UserError: the server itself cannot do it now: its files, or its SuperLink.
    """
    invitation = Invitations(folder).read().get(request.invitation)
    digest = sha256(request.secret).hexdigest()
    if invitation is None:
        return Answer.refused(f"this server knows no such token (any more); {ASK_AGAIN}.")
    if not hmac.compare_digest(digest, invitation.secret_digest):
        return Answer.refused("the token's secret is wrong: copy the line again, as it was given.")
    name = request.name or invitation.name
    if invitation.name and name != invitation.name:
        cause = f"the token is for a node named '{invitation.name}', and this one is '{name}'."
        return Answer.refused(cause, name)
    if not request.public_key:
        welcome = Answer(state=WELCOME, sentence="the token is good.", name=name)
        return _taken(folder, name) or _spent(invitation, "") or welcome
    try:
        name = parse_name(name, "the node's name")
        key = parse_public_key(request.public_key.encode(), "the node's key")
        _check_signature(key, request, name)
    except UserError as error:
        return Answer.refused(str(error), name)
    return (
        _known(folder, name, key)
        or _spent(invitation, key.line)
        or _admit(folder, invitation, request, name, key, address)
    )


def _spent(invitation: Invitation, public_key: str) -> Answer | None:
    if public_key in invitation.used:
        return None
    if moment() >= invitation.expires:
        return Answer.refused(f"the token has expired on {invitation.expires}; {ASK_AGAIN}.")
    if len(invitation.used) >= invitation.count:
        times = "once" if invitation.count == 1 else f"{invitation.count} times"
        return Answer.refused(
            f"the token was used already: it lets a key in {times}, and {ASK_AGAIN}."
        )
    return None


def _known(folder: Path, name: str, key: PublicKey) -> Answer | None:
    """The answer for a key or a name that the table or a pending request knows."""
    table = FleetTable.read(table_path(folder))
    owner = table.name_of(key.line)
    if owner and owner != name:
        return Answer.refused(f"this key is the one of '{owner}', and the name is '{name}'.", name)
    mine = next((k for k in table.nodes.get(name, ()) if k.public_key == key.line), None)
    if mine is not None and mine.state == REVOKED:
        return Answer.refused(f"this key was revoked on {mine.ended}.", name)
    if mine is not None:
        return Answer(state=ADMITTED, sentence=f"{name} is registered.", name=name)
    waiting = PendingNodes(folder).get(name)
    if waiting is None or waiting.public_key != key.line:
        return _taken(folder, name)
    if waiting.refused:
        return Answer.refused(f"the server's owner has refused it on {waiting.refused}.", name)
    return replace(_waits(name, key), is_new=False)


def _taken(folder: Path, name: str) -> Answer | None:
    known = FleetTable.read(table_path(folder)).nodes
    if name not in known and PendingNodes(folder).get(name) is None:
        return None
    return Answer.refused(
        f"the name '{name}' is taken by another key; give this node another --client-id, or ask "
        "the server's owner to rotate the key.",
        name,
    )


def _admit(
    folder: Path,
    invitation: Invitation,
    request: Request,
    name: str,
    key: PublicKey,
    address: str,
) -> Answer:
    oldest = moment(datetime.now(UTC) - timedelta(days=KEPT_DAYS))
    if invitation.approve:
        with open_fleet(folder) as fleet:
            done = fleet.admit(name, key)
        Invitations(folder).use(invitation, key.line, oldest=oldest)
        return Answer(state=ADMITTED, sentence=done, name=name)
    waiting = PendingNode(
        name=name,
        public_key=key.line,
        asked=moment(),
        address=address,
        version=request.version,
        invitation=invitation.id,
    )
    PendingNodes(folder).put(waiting)
    Invitations(folder).use(invitation, key.line, oldest=oldest)
    return _waits(name, key)


def _waits(name: str, key: PublicKey) -> Answer:
    sentence = (
        f"{name} waits for the server's owner, who approves {fingerprint(key.line)} with "
        f"`flexlora fleet add {name}`."
    )
    return Answer(state=PENDING, sentence=sentence, name=name)


def _check_signature(key: PublicKey, request: Request, name: str) -> None:
    public = serialization.load_pem_public_key(key.pem)
    assert isinstance(public, ec.EllipticCurvePublicKey)
    try:
        signed = signed_part(request.invitation, name)
        public.verify(request.signature, signed, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise UserError("the request is not signed by the key that it brings.") from None
