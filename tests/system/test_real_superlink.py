"""The doctor asks a real ``flower-superlink`` on loopback, with TLS and node authentication.

What ``tls_servers.Said`` answers in the fast tests is what Flower answers here.
"""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest

from flexlora.clients.setup import node_key_checks
from real_superlink import flwr, real_superlink
from tls_servers import asked, key_file, only

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_proxy")]


def test_a_real_superlink_with_tls_and_node_authentication(tmp_path, ca, leaf, monkeypatch):
    """The answers that ``Said`` gives are those of Flower, and asking changes nothing there."""
    key = key_file(tmp_path)
    tls = (
        "--ssl-certfile",
        leaf.file,
        "--ssl-keyfile",
        leaf.key_file,
        "--ssl-ca-certfile",
        ca.file,
    )
    given = (*tls, "--enable-supernode-auth", "--database", tmp_path / "state.db")
    with real_superlink(tmp_path, *given, roots=ca.file) as (port, environment):
        found = asked(port, ca, key=key)
        ours = [
            found[name].status for name in ("certificate", "superlink", "clock", "control path")
        ]
        assert ours == ["ok"] * 4 and "of Flower 1.41" in found["superlink"].message
        assert "does not know the key" in found["node key"].message
        flwr(environment, "supernode", "register", f"{key}.pub", "own")
        assert asked(port, ca, key=key)["node key"].message.endswith("is registered")
        for off, status in ((8.0, "failed"), (3.0, "ok"), (-300.0, "ok"), (-308.0, "failed")):
            clock = SimpleNamespace(time=lambda off=off: time.time() + off)
            monkeypatch.setattr(node_key_checks, "time", clock)
            assert asked(port, ca, key=key)["node key"].status == status, off
        nodes = json.loads(flwr(environment, "supernode", "list", "own", "--format", "json"))
        assert [node["status"] for node in nodes["nodes"]] == ["registered"], nodes
        only(asked(port), "failed", "certificate", "whom this machine does not trust")


def test_a_real_superlink_in_the_clear(tmp_path, ca):
    with real_superlink(tmp_path, "--insecure") as (port, _):
        found = asked(port)
        assert {finding.status for finding in found.values()} == {"ok"}, found
        assert "over plain HTTP" in found["superlink"].message
        only(asked(port, ca), "failed", "certificate", "speaks plain HTTP")
