"""The alert rules ask for metrics, labels and values that are served, and fire when they should."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import urllib.request
from contextlib import contextmanager

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from test_prometheus import samples, scraped

from federation import ROOT
from flexlora.config.resolve import Config
from flexlora.errors import UserError
from flexlora.runs.outcomes import Outcome
from flexlora.server.following.follower import Follower
from flexlora.server.following.metrics import follower_endpoint, free_port
from flexlora.server.following.place import Place
from flexlora.server.init import server_init
from flexlora.server.observing.prometheus import PrometheusObserver, metrics_endpoint

ALERTS = ROOT / "server" / "templates" / "prometheus-alerts.yaml"
RULES = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


@pytest.fixture
def follower(tmp_path):
    server_init(folder=str(tmp_path / "server"), host=["localhost"], port=9092, proxy="none")
    return Follower(Place.of(str(tmp_path / "server")), None, print)


@contextmanager
def served(follower, **keys):
    port = free_port()
    config = Config.of({"server.metrics-port": port, **keys})
    with follower_endpoint(config, follower):
        yield port


def with_serverapp(follower, port):
    """The follower follows a run whose ServerApp serves its metrics on ``port``."""
    follower._note(serverapp_port=port)
    follower.state = "running"


def test_every_name_label_and_value_of_an_alert_is_served(follower):
    inner = free_port()
    with (
        metrics_endpoint(Config.of({"server.metrics-port": inner})) as (observer,),
        served(follower) as port,
    ):
        observer.round_finished({"round": 1})
        with_serverapp(follower, inner)
        found = set(samples(scraped(port)))
    assert len(RULES) >= 8 and len({rule["alert"] for rule in RULES}) == len(RULES)
    asked = set()
    for rule in RULES:
        for name, pairs in re.findall(r"(flexlora_\w+)(?:\{([^}]*)\})?", rule["expr"]):
            asked.add(name)
            labels = [dict(labels) for known, labels in found if known == name]
            assert labels, f"{rule['alert']} asks for {name}, which is not served"
            for label, operator, value in re.findall(r'(\w+)(=~?)"([^"]*)"', pairs):
                wanted = value.split("|") if operator == "=~" else [value]
                assert set(wanted) <= {known.get(label) for known in labels}, rule["alert"]
        assert rule["annotations"]["summary"] and rule["labels"]["severity"] in ("page", "ticket")
    kinds = ("state", "failures_total", "skipped", "finished_timestamp", "disk_free", "runs_failed")
    assert all(any(kind in name for name in asked) for kind in kinds)


@pytest.mark.skipif(not shutil.which("promtool"), reason="no promtool here")
def test_promtool_finds_nothing_wrong():
    done = subprocess.run(["promtool", "check", "rules", ALERTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_last_values_stay_when_the_server_app_is_gone(follower):
    inner = free_port()
    with served(follower) as port:
        assert "flexlora_round " not in scraped(port), "nothing has run yet"
        assert samples(scraped(port))["flexlora_federation_state", (("state", "idle"),)] == 1
        with metrics_endpoint(Config.of({"server.metrics-port": inner})) as (observer,):
            observer.round_started(3, 8, 2)
            observer.round_skipped(3, "skipped")
            with_serverapp(follower, inner)
            assert samples(scraped(port))["flexlora_round", ()] == 3
        follower.state = "waiting"
        after = samples(scraped(port))
        assert after["flexlora_round", ()] == 3 and after["flexlora_rounds_skipped_total", ()] == 1
        states = {labels[0][1]: v for (name, labels), v in after.items() if name.endswith("state")}
        assert states == {"idle": 0, "waiting": 1, "running": 0, "failed": 0}
    with served(follower) as port:
        assert samples(scraped(port))["flexlora_round", ()] == 3, "the next follower knows them"


def test_a_server_app_that_hangs_does_not_hang_the_page(follower):
    with socket.socket() as silent, served(follower) as port:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with_serverapp(follower, silent.getsockname()[1])
        assert "flexlora_federation_state" in scraped(port)


def test_only_the_metrics_are_there_and_the_port_is_free_afterwards(follower):
    with served(follower) as port:
        with pytest.raises(urllib.request.HTTPError) as refusal:
            scraped(port, "/")
        assert refusal.value.code == 404
        taken = pytest.raises(UserError, match=rf"metrics-port is {port}, which another process")
        with taken, served(follower, **{"server.metrics-port": port}):
            raise AssertionError("it must not listen")
    with pytest.raises(urllib.request.URLError):
        scraped(port)


def test_a_skipped_round_and_a_refused_update_are_counted_for_the_alerts():
    registry = CollectorRegistry()
    observer = PrometheusObserver(Config(), registry)
    before = samples(generate_latest(registry).decode())
    observer.round_skipped(1, "why")
    observer.replied("client", Outcome.REFUSED, "why", False)
    after = samples(generate_latest(registry).decode())
    changed = {name for name, _ in before if before.get((name, _)) != after.get((name, _))}
    assert {"flexlora_rounds_skipped_total", "flexlora_client_failures_total"} <= changed
    assert after["flexlora_round_finished_timestamp_seconds", ()] > 1.6e9
