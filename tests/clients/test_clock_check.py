"""``flexlora client clock``: a node whose clock is wrong says so before the server refuses it.

The server's clock is what a fake server says in ``Date``; this machine's is replaced where Python
reads it (OpenSSL's, which judges certificates, cannot be: there the certificates' dates move).
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import tls_servers
from flexlora.clients.setup.clock import check_clock, watch_clock
from flexlora.commands.cli import main
from flexlora.deploy import connections
from flexlora.deploy.doctor import failed, ok, warning
from tls_servers import DAY, Said, serving

pytestmark = pytest.mark.usefixtures("no_proxy")


def asked(port, *roots):
    return main(["client", "clock", "--superlink", f"127.0.0.1:{port}", *map(str, roots)])


@pytest.mark.parametrize(
    ("ahead", "status", "words"),
    [
        (0.0, 0, "clock ok: at most "),
        (-412.0, 1, "s ahead of the server's; node authentication takes a clock 5 s ahead"),
        (412.0, 1, "s behind the server's; node authentication takes a clock 5 s ahead and 305 s"),
        (None, 0, "does not tell its time"),
    ],
)
def test_the_command_asks_the_server_over_its_own_connection(
    ahead, status, words, ca, leaf, capsys
):
    said = Said(ahead=ahead)
    with serving(said, certificate=leaf) as port:
        assert asked(port, "--root-certificates", ca.file) == status
    printed = capsys.readouterr().err
    assert words in printed and ("timedatectl" in printed) == (words[:5] != "clock"), printed
    assert said.asked == [("GET", "/health")]


def test_a_clock_of_this_machine_that_is_wrong(ca, leaf, monkeypatch):
    """The server's clock is right here, and this machine's runs 412 s ahead."""
    ahead = SimpleNamespace(time=lambda: time.time() + 412)
    monkeypatch.setattr(connections, "time", ahead)
    with serving(Said(), certificate=leaf) as port:
        finding = check_clock("127.0.0.1", port, roots=ca.file)
    assert finding.status == "failed"
    assert finding.message.startswith("this machine's clock is 411") or "is 412" in finding.message


@pytest.mark.parametrize(
    ("ahead", "status"),
    [(6 * DAY, "failed"), (0.0, "warning")],
    ids=["the clock explains it", "it does not"],
)
def test_a_certificate_that_is_not_valid_yet_by_this_clock(ahead, status, folder, ca):
    later = tls_servers.server(folder, ca, days=(5.0, 60.0))
    with serving(Said(ahead=ahead), certificate=later) as port:
        finding = check_clock("127.0.0.1", port, roots=ca.file)
    words = {"failed": "6.0 days behind the server's", "warning": "cannot be compared: the cert"}
    assert finding.status == status and words[status] in finding.message, finding


def test_a_server_whose_time_cannot_be_had_stops_no_start(tmp_path, ca, leaf, folder, capsys):
    """The SuperNode waits for its server and refuses certificates by itself."""
    with serving(Said(), certificate=leaf) as port:
        other = tls_servers.authority(folder, "another")
        assert asked(port, "--root-certificates", other.file) == 0
        assert asked(port, "--root-certificates", tmp_path / "none") == 0
    assert asked(port, "--root-certificates", ca.file) == 0
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("clock warning: the clocks cannot be compared") for line in lines)
    for line, words in zip(
        lines, ("signed by", "No such file", "refuses connections"), strict=True
    ):
        assert words in line


def test_watching_says_what_changes_and_repeats_a_failure(capsys, monkeypatch):
    off = failed("off", "set it")
    seen = [ok("right"), off, off, off, warning("unknown", "wait"), ok("right"), ok("right")]
    now = iter(range(0, 10**6, 200))  # two calls a look: 400 s from one to the next
    monkeypatch.setattr(
        "flexlora.clients.setup.clock.time",
        SimpleNamespace(monotonic=lambda: next(now), sleep=pytest.fail),
    )
    left = list(seen)
    watch_clock(lambda: left.pop(0), seconds=1.0, alive=lambda: bool(left))
    lines = [line.split(":")[0] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["clock failed", "clock failed", "clock warning", "clock ok"]


def test_a_watch_ends_with_the_process_that_started_it(ca, leaf, tmp_path):
    """As in ``start-supernode``: a shell starts the watch, becomes the SuperNode, and is killed."""
    program = Path(sys.executable).parent / "flexlora"
    with serving(Said(ahead=-60.0), certificate=leaf) as port, (tmp_path / "log").open("w") as log:
        command = (
            f"{program} client clock --superlink 127.0.0.1:{port} --root-certificates {ca.file}"
            " --watch 3600 & echo $!; exec sleep 600"
        )
        node = subprocess.Popen(["sh", "-c", command], stdout=subprocess.PIPE, stderr=log)
        try:
            watch = int(node.stdout.readline())
            wait_for(lambda: "s ahead of the server's" in (tmp_path / "log").read_text())
            assert node.poll() is None and alive(watch)
        finally:
            node.kill()
            node.wait()
            node.stdout.close()
        wait_for(lambda: not alive(watch))


def alive(pid):
    """Whether the process runs; one that nobody has waited for has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--superlink", "fl.example.org"), "expected HOST:PORT"),
        (("--superlink", "fl.example.org:9092", "--watch", "-1"), "--watch is -1, expected 0 or"),
    ],
)
def test_mistyped_options(arguments, words, capsys):
    assert main(["client", "clock", *arguments]) == 2
    assert words in capsys.readouterr().err
