"""The Prometheus endpoint of a real run, scraped while it goes, and the dashboard over it."""

from __future__ import annotations

import json
import re
import socket
import urllib.error
import urllib.request
from collections import Counter

import pytest
from flwr.app import Error, Message
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from federation import ROOT, TamperingGrid, client_rows, federation, nobody_joins, rounds, small
from flexlora.clients.worker import worker_for
from flexlora.config.resolve import Config
from flexlora.errors import UserError
from flexlora.runs.outcomes import Outcome
from flexlora.server.observing.observer import Observer
from flexlora.server.observing.prometheus import PrometheusObserver, metrics_endpoint
from flexlora.simulations.simulate import simulate

DASHBOARD = ROOT / "server" / "templates" / "grafana-dashboard.json"
NAMES = {
    "flexlora_round",
    "flexlora_rounds_total",
    "flexlora_clients",
    "flexlora_client_failures_total",
    "flexlora_loss",
    "flexlora_bytes_total",
    "flexlora_round_seconds_bucket",
    "flexlora_server_rss_bytes",
    "flexlora_resent_total",
    "flexlora_info",
}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def scraped(port, path="/metrics"):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=60) as answer:
        return answer.read().decode()


def samples(text):
    """``{(name, sorted labels): value}`` as Prometheus reads the text."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class Scraper(Observer):
    """An observer that scrapes the run's own endpoint at the end of every round."""

    def __init__(self, port):
        self.port, self.texts = port, []

    def round_finished(self, metrics):
        self.texts.append(scraped(self.port))


def losing(reply, message):
    """The second round's reply of the victim is lost."""
    if message.metadata.group_id == "2":
        return [Message(Error(code=5, reason="the node is gone"), reply_to=message)]
    return [reply]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two rounds, in the second of which one client is lost; the page after every round."""
    folder, port = tmp_path_factory.mktemp("metrics") / "run", free_port()
    config = small(num_server_rounds=2, server__metrics_port=port, server__resends=0)
    worker = worker_for(config)
    grid = TamperingGrid(worker, tamper=losing, victims=sorted(worker.client_ids)[:1])
    scraper = Scraper(port)
    federation(grid, config, folder, observer=scraper)
    return folder, port, scraper.texts, sorted(worker.client_ids)


def test_every_promised_name_is_there_and_no_client_is_named(run):
    _, _, texts, client_ids = run
    assert {name for name, _ in samples(texts[-1])} >= NAMES
    assert len(texts) == 3 and client_ids
    for text in texts:
        assert not [client_id for client_id in client_ids if client_id in text]


def test_the_numbers_are_those_of_the_run_folder(run):
    folder, _, texts, _ = run
    rows = rounds(folder)
    for at, text in enumerate(texts):
        found = samples(text)
        assert found["flexlora_round", ()] == at and found["flexlora_rounds_total", ()] == at
        assert found["flexlora_rounds_planned", ()] == 2
        assert found["flexlora_round_seconds_count", ()] == at
        for key, direction in (("bytes_down", "down"), ("bytes_up", "up")):
            total = sum(row.get(key, 0) for row in rows[: at + 1])
            assert found["flexlora_bytes_total", (("direction", direction),)] == total
        for name in ("rank_2", "rank_4"):
            labels = (("rank_class", name), ("split", "validation"))
            assert found["flexlora_loss", labels] == pytest.approx(rows[at][f"eval_loss/{name}"])
        everybody = (("rank_class", "all"), ("split", "validation"))
        assert found["flexlora_loss", everybody] == pytest.approx(rows[at]["eval_loss"])
        trained = found.get(("flexlora_loss", (("rank_class", "all"), ("split", "train"))))
        assert trained == (pytest.approx(rows[at]["train_loss"]) if at else None)
        assert found["flexlora_server_rss_bytes", ()] > 50e6
        assert found["flexlora_clients", (("rank_class", "rank_2"),)] == 2
    assert rows[2]["bytes_up"] > 0


def test_failures_are_counted_by_kind_as_in_clients_csv(run):
    folder, _, texts, _ = run
    statuses = Counter(row["status"] for row in client_rows(folder))
    assert statuses == {"ok": 7, "failed": 1}
    kinds = [
        {labels[0][1]: v for (name, labels), v in samples(t).items() if "failures_total" in name}
        for t in texts
    ]
    failures = {outcome.value for outcome in Outcome if outcome.is_failure}
    assert set(kinds[0]) == failures | {"evaluation"}, "all are there from the start, as 0"
    assert [sum(found.values()) for found in kinds] == [0, 0, 1]
    assert kinds[2]["lost"] == 1


def test_the_endpoint_ends_with_the_run(run):
    with pytest.raises(urllib.error.URLError, match="refused"):
        scraped(run[1])


def test_a_run_that_fails_closes_its_endpoint_too(tmp_path):
    port = free_port()
    with pytest.raises(UserError, match="nodes are connected"):
        nobody_joins(small(server__metrics_port=port), tmp_path / "run")
    with pytest.raises(urllib.error.URLError, match="refused"):
        scraped(port)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port))


def test_a_port_that_is_taken_is_one_sentence_and_no_folder(tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        wanted = rf"^server\.metrics-port is {port}, which another process listens on at 127"
        with pytest.raises(UserError, match=wanted):
            simulate(small(server__metrics_port=port), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_a_host_that_is_not_ours_is_one_sentence(host):
    config = Config.of({"server.metrics-port": free_port(), "server.metrics-host": host})
    refusal = pytest.raises(UserError, match=f"^server.metrics-host is '{host}'.* such as 127")
    with refusal, metrics_endpoint(config):
        raise AssertionError("it must not listen")


def test_no_port_is_no_endpoint():
    with metrics_endpoint(Config()) as observers:
        assert observers == []


def test_it_listens_where_it_is_told_and_says_when_others_reach_it(caplog):
    port = free_port()
    with metrics_endpoint(Config.of({"server.metrics-port": port})):
        assert "flexlora_info{" in scraped(port)
    assert caplog.records == []
    with metrics_endpoint(
        Config.of({"server.metrics-port": port, "server.metrics-host": "0.0.0.0"})
    ):
        assert "flexlora_info{" in scraped(port)
    assert f"served on 0.0.0.0 to whoever reaches port {port}" in caplog.text


def exported(observer_config=None):
    registry = CollectorRegistry()
    return PrometheusObserver(observer_config or Config(), registry), registry


def test_what_is_not_there_is_not_told_as_a_number():
    """A round without an evaluation keeps the last loss; a mean over nobody is no loss."""
    observer, registry = exported()
    observer.round_finished({"round": 1, "train_loss": float("nan"), "seconds": 1.5})
    observer.round_finished({"round": 2, "train_loss": 0.5, "eval_loss": 0.25, "seconds": 1.5})
    observer.round_finished({"round": 3, "train_loss": None, "seconds": 40.0, "bytes_up": 7})
    observer.resent("secret", 2, "Flower error 5: gone")
    observer.round_skipped(3, "skipped: 0 updates came")
    text = generate_latest(registry).decode()
    found = samples(text)
    assert found["flexlora_loss", (("rank_class", "all"), ("split", "train"))] == 0.5
    assert found["flexlora_loss", (("rank_class", "all"), ("split", "validation"))] == 0.25
    assert found["flexlora_resent_total", ()] == 1 and "secret" not in text
    assert found["flexlora_round_seconds_sum", ()] == pytest.approx(43.0)
    assert sum(v for (name, _), v in found.items() if "failures_total" in name) == 0


def test_clients_cannot_make_labels():
    """A cause is a client's own words: whatever they are, the labels stay those that were there."""
    observer, registry = exported()
    before = set(samples(generate_latest(registry).decode()))
    for number in range(200):
        observer.replied(f"client_{number}", Outcome.FAILED, f"{number}\n# HELP evil", False)
    assert set(samples(generate_latest(registry).decode())) == before


def expressions(value):
    """All PromQL of the dashboard: what panels ask and what variables are filled from."""
    if isinstance(value, dict):
        own = [value[key] for key in ("expr", "definition") if isinstance(value.get(key), str)]
        return own + [found for inner in value.values() for found in expressions(inner)]
    return [found for inner in value for found in expressions(inner)] if type(value) is list else []


def test_every_metric_and_label_of_the_dashboard_is_exported(run):
    found = samples(run[2][-1])
    asked = expressions(json.loads(DASHBOARD.read_text()))
    assert len(asked) >= 12
    names = {name for text in asked for name in re.findall(r"flexlora_\w+", text)}
    exported_names = {name for name, _ in found}
    assert names - exported_names == set()
    assert NAMES - names == set(), "and every promised metric is drawn"
    for text in asked:
        for name, inside in re.findall(r"(flexlora_\w+)\{([^}]*)\}", text):
            labels = {label for (own, pairs) in found for label, _ in pairs if own == name}
            used = set(re.findall(r"(\w+)\s*[=!]~?", inside))
            assert used <= labels | {"instance"}, text
        for by in re.findall(r"by \((\w+)\)", text):
            assert any(by in dict(pairs) for _, pairs in found), text
        assert text.count("(") == text.count(")") and text.count("{") == text.count("}")


def test_the_dashboard_has_what_grafana_reads():
    board = json.loads(DASHBOARD.read_text())
    assert board["id"] is None and board["uid"] and board["title"] and board["schemaVersion"] >= 36
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = Counter()
    for panel in panels:
        assert panel["type"] in ("stat", "gauge", "bargauge", "table", "timeseries")
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["title"] and panel["targets"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        at = panel["gridPos"]
        assert at["x"] >= 0 and at["x"] + at["w"] <= 24
        cells.update((at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"]))
    assert set(cells.values()) == {1}, "no panel lies on another"
