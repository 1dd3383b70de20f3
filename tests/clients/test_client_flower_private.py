"""Flower's private names are there and mean what ``flower_private.py`` says."""

from __future__ import annotations

from base64 import b64decode
from datetime import datetime

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature

from flexlora.clients.setup import flower_private


def test_an_activation_is_signed_as_flower_verifies_it_and_asks_for_no_heartbeat():
    key = ec.generate_private_key(ec.SECP384R1())
    headers, body = flower_private.activation_that_is_refused(key, 1_700_000_000.0)
    moment = headers[flower_private.TIMESTAMP_HEADER]
    assert datetime.fromisoformat(moment).timestamp() == 1_700_000_000.0
    public = bytes_to_public_key(b64decode(headers[flower_private.FLEET_HTTP_PUBLIC_KEY_HEADER]))
    signature = b64decode(headers[flower_private.FLEET_HTTP_SIGNATURE_HEADER])
    assert verify_signature(public, moment.encode(), signature)
    assert not verify_signature(public, b"another time", signature)
    request = ActivateNodeRequest.FromString(body)
    assert request.heartbeat_interval == 0.0
    assert bytes_to_public_key(request.public_key) == public


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WRONG_TYPE", 1002),
        ("BAD_HEARTBEAT", 2003),
        ("NOT_ACTIVATED", 2004),
        ("SECONDS_AHEAD", 5),
        ("SECONDS_BEHIND", 305),
    ],
)
def test_flowers_numbers(name, value):
    assert getattr(flower_private, name) == value
