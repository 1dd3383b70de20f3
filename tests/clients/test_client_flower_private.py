"""Flower's private names are there and mean what ``flower_private.py`` says."""

from __future__ import annotations

from base64 import b64decode
from datetime import datetime
from importlib import metadata
from typing import get_type_hints

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature
from flwr.supercore.retry.http_retry import _RETRYABLE_STATUS_CODES
from flwr.supernode.fleet_http_client import FleetHttpClient

from flexlora.clients.setup import flower_private
from flexlora.deploy import request_watch


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


def test_the_programs_are_those_that_flower_installs():
    assert set(flower_private.PROGRAMS) == {"flower-supernode", "flower-superexec"}
    for name, program in flower_private.PROGRAMS.items():
        (found,) = metadata.entry_points(group="console_scripts", name=name)
        assert program is found.load()


def test_flowers_requests_are_sent_and_named_as_the_watch_expects():
    """Every request of a SuperNode goes through ``_send``, under the name that it has here."""
    seen = []

    class Client(FleetHttpClient):
        def _send(self, context, *, stream=False):
            seen.append(context.rpc_method.rpartition("/")[2])
            return httpx.Response(200, request=context.request)

    client = Client("http://127.0.0.1:1")
    for method in (request_watch.HEARTBEAT, request_watch.ACTIVATE, request_watch.CONFIRM):
        kind = get_type_hints(getattr(FleetHttpClient, method))["request"]
        getattr(client, method)(kind())
    assert seen == ["SendNodeHeartbeat", "ActivateNode", "ConfirmMessageReceived"]
    assert issubclass(Client, flower_private.ProtobufClient)
    assert 503 in _RETRYABLE_STATUS_CODES and 500 not in _RETRYABLE_STATUS_CODES
