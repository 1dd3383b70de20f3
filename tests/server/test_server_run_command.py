"""``flexlora server run``: its exit status, and what a signal does to the run that it follows."""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace

import pytest

from flexlora.commands.cli import main
from flexlora.server.following import command
from flexlora.server.following.follower import Follower
from flexlora.server.following.place import Place
from flexlora.server.init import server_init


@pytest.fixture
def place(tmp_path):
    server_init(folder=str(tmp_path / "server"), host=["localhost"], port=9092, proxy="none")
    return Place.of(str(tmp_path / "server"))


@pytest.fixture
def stopped(monkeypatch):
    """The runs that Flower was asked to stop; the handler of SIGTERM is as before afterwards."""
    before, asked = signal.getsignal(signal.SIGTERM), []
    flower = SimpleNamespace(stop=asked.append)
    monkeypatch.setattr(command.FlowerCommands, "of", lambda place: flower)
    yield asked
    signal.signal(signal.SIGTERM, before)


def following(monkeypatch, then):
    """A follower that follows run 7, and then ``then()`` happens."""

    def run(self):
        self._note(run_id="7", open=True)
        return then()

    monkeypatch.setattr(Follower, "run", run)


@pytest.mark.parametrize("status", [0, 1])
def test_the_exit_status_is_the_runs(status, place, stopped, monkeypatch):
    following(monkeypatch, lambda: status)
    assert main(["server", "run", str(place.folder)]) == status
    assert stopped == []


def test_ctrl_c_stops_the_run_and_ends_with_130(place, stopped, monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    following(monkeypatch, interrupted)
    assert main(["server", "run", str(place.folder)]) == 130
    assert stopped == ["7"] and "run 7 is stopped" in capsys.readouterr().out
    standing = place.read_standing()
    assert standing.open and standing.run_id == "", "the next one goes on with the folder"


def test_sigterm_leaves_the_run_to_itself(place, stopped, monkeypatch, capsys):
    def ended():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)  # the handler runs in this thread, and ends this

    following(monkeypatch, ended)
    assert main(["server", "run", str(place.folder)]) == 0
    assert stopped == [] and "run 7 goes on" in capsys.readouterr().out
    assert place.read_standing().run_id == "7", "and the next one follows it"
