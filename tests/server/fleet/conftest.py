"""A server folder whose SuperLink is in memory."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

from fleet_fakes import Superlink
from flexlora.server.fleet import operations


@pytest.fixture
def superlink(monkeypatch):
    own = Superlink()

    @contextmanager
    def api(folder):
        yield own

    monkeypatch.setattr(operations, "control_api", api)
    return own


@pytest.fixture
def folder(tmp_path, superlink):
    (tmp_path / "flwr").mkdir()
    (tmp_path / "flwr" / "config.toml").touch()
    (tmp_path / "nodes").mkdir()
    return tmp_path
