"""Flower's private names behind the doctor's node checks. When Flower moves, check each line here.

Names (``tests/clients/test_client_flower_private.py`` fails where one is gone):

    ActivateNodeRequest          a SuperNode's first request; fields ``public_key``,
                                 ``heartbeat_interval``
    public_key_to_bytes          the form in which a server stores a node's key
    sign_message                 how a node signs the time of a request
    FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER, TIMESTAMP_HEADER
                                 the headers of a signed request; the time is ISO 8601 in UTC
    TIMESTAMP_TOLERANCE, SYSTEM_TIME_TOLERANCE
                                 seconds that a signature may be old, and that clocks may differ

    ApiErrorCode                 the codes in the JSON body of a refused request

    flower_supernode, flower_superexec
                                 the programs of these names, as functions without arguments
    ProtobufClient               base of every HTTP client of Flower's; ``_send`` sends one request
                                 (``flexlora/deploy/request_watch.py``). A SuperNode's methods are
                                 named as in ``RequestWatch``; Flower retries 503 and not 500

Facts without a name (``tests/system/test_real_superlink.py`` asks a real SuperLink): the paths
``/v1/fleet/activate-node`` and ``/v1/control/list-nodes``, and that a server looks a node's key up
before it checks the heartbeat interval.
"""

from __future__ import annotations

from base64 import b64encode
from datetime import UTC, datetime

from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.supercore.cli import flower_superexec
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.error.base import ApiErrorCode
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.protobuf.client import ProtobufClient
from flwr.supernode.cli import flower_supernode

__all__ = [
    "BAD_HEARTBEAT",
    "NOT_ACTIVATED",
    "PROGRAMS",
    "SECONDS_AHEAD",
    "SECONDS_BEHIND",
    "WRONG_TYPE",
    "ProtobufClient",
    "activation_that_is_refused",
]

WRONG_TYPE = ApiErrorCode.UNSUPPORTED_CONTENT_TYPE
BAD_HEARTBEAT = ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL  # of a node that is registered
NOT_ACTIVATED = ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED  # of one that is not
PROGRAMS = {"flower-supernode": flower_supernode, "flower-superexec": flower_superexec}
NO_HEARTBEAT = 0.0  # seconds; Flower takes 10 to 1800
# A clock may be ahead of the server's by the first, and behind it by the second.
SECONDS_AHEAD = SYSTEM_TIME_TOLERANCE
SECONDS_BEHIND = TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE


def activation_that_is_refused(
    key: ec.EllipticCurvePrivateKey, seconds: float
) -> tuple[dict[str, str], bytes]:
    """Headers and body of a node's activation, signed at ``seconds`` since 1970.

    Its heartbeat interval is invalid: the server looks the key up and then refuses, so that the
    error code tells whether the key is registered, and the node is not activated.
    """
    public = public_key_to_bytes(key.public_key())
    now = datetime.fromtimestamp(seconds, UTC).isoformat()
    headers = {
        "Content-Type": "application/protobuf",
        FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(public).decode(),
        FLEET_HTTP_SIGNATURE_HEADER: b64encode(sign_message(key, now.encode())).decode(),
        TIMESTAMP_HEADER: now,
    }
    request = ActivateNodeRequest(public_key=public, heartbeat_interval=NO_HEARTBEAT)
    return headers, request.SerializeToString()
