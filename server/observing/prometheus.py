"""The run's numbers for Prometheus, on ``server.metrics-host`` and ``-port`` where a port is given.

Served by prometheus_client from a registry of its own, at ``/metrics``; without TLS and without a
login, so on the loopback interface by default. Labels name no client.
``templates/grafana-dashboard.json`` draws them.
"""

from __future__ import annotations

import errno
import logging
from collections import Counter as Counts
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from ipaddress import ip_address

import psutil
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    start_http_server,
)

import flexlora
from flexlora.config.resolve import Config
from flexlora.errors import UserError
from flexlora.runs.outcomes import Outcome
from flexlora.server.members.roster import Roster
from flexlora.server.observing.observer import Observer

__all__ = ["PrometheusObserver", "listening", "metrics_endpoint"]

LOG = logging.getLogger(__name__)
ROUND_BUCKETS = (1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600)
DIRECTIONS = {"down": "bytes_down", "up": "bytes_up", "evaluation_down": "eval_bytes_down"}
ALL_CLASSES = "all"  # as a rank class: every client under the adapter of its own class
EVALUATION = "evaluation"
FAILURES = (*(outcome.value for outcome in Outcome if outcome.is_failure), EVALUATION)
RUN_LABELS = {
    "method": "method.name",
    "model": "model.name",
    "quantization": "model.quantization",
    "wire_dtype": "wire.dtype",
    "seed": "seed",
}


class PrometheusObserver(Observer):
    """Counts the events of this process; a resumed run starts from zero."""

    def __init__(self, config: Config, registry: CollectorRegistry) -> None:
        self._split = config.eval.split
        self._classes: list[str] = []
        self._of_rounds(registry)
        self._of_clients(registry)
        given = config.flat()
        run = {label: str(given[key]) for label, key in RUN_LABELS.items()}
        info = Info("flexlora", "What runs", registry=registry)
        info.info({"version": flexlora.__version__, **run})
        process = psutil.Process()
        memory = Gauge("flexlora_server_rss_bytes", "Resident memory", registry=registry)
        memory.set_function(lambda: process.memory_info().rss)

    def _of_rounds(self, registry: CollectorRegistry) -> None:
        self.round = Gauge("flexlora_round", "Round in progress", registry=registry)
        self.rounds = Counter("flexlora_rounds", "Rounds of training done", registry=registry)
        text = "Rounds that changed nothing"
        self.skipped = Counter("flexlora_rounds_skipped", text, registry=registry)
        text = "When the last round was finished, in seconds since the epoch"
        self.moment = Gauge("flexlora_round_finished_timestamp_seconds", text, registry=registry)
        self.moment.set_to_current_time()  # of the process, until there is one
        self.planned = Gauge("flexlora_rounds_planned", "Rounds of the run", registry=registry)
        self.seconds = Histogram(
            "flexlora_round_seconds", "Seconds of a round", registry=registry, buckets=ROUND_BUCKETS
        )
        text, labels = "Mean loss of the last round that has one", ["rank_class", "split"]
        self.loss = Gauge("flexlora_loss", text, labels, registry=registry)
        text, labels = "Bytes of factors, as sent", ["direction"]
        self.bytes = Counter("flexlora_bytes", text, labels, registry=registry)
        for direction in DIRECTIONS:
            self.bytes.labels(direction=direction)

    def _of_clients(self, registry: CollectorRegistry) -> None:
        text, labels = "Clients that take part", ["rank_class"]
        self.clients = Gauge("flexlora_clients", text, labels, registry=registry)
        text = "Clients that cannot take part"
        self.left_out = Gauge("flexlora_clients_left_out", text, registry=registry)
        text, labels = "Replies that do not count", ["cause"]
        self.failures = Counter("flexlora_client_failures", text, labels, registry=registry)
        self.resends = Counter("flexlora_resent", "Messages sent again", registry=registry)
        for label in FAILURES:
            self.failures.labels(cause=label)  # Prometheus sees an increase only from a zero on

    def met(self, roster: Roster) -> None:
        counts = Counts(member.rank_class.name for member in roster.members.values())
        for name, count in counts.items():
            self.clients.labels(rank_class=name).set(count)
        for name in set(self._classes) - set(counts):
            self.clients.remove(name)
        self._classes = list(counts)
        self.left_out.set(len(roster.left_out))

    def round_started(self, server_round: int, num_rounds: int, num_clients: int) -> None:
        self.round.set(server_round)
        self.planned.set(num_rounds)

    def replied(self, client_id: str, outcome: Outcome, cause: str, late: bool) -> None:
        if outcome.is_failure:
            self.failures.labels(cause=outcome.value).inc()

    def evaluated(self, client_id: str, cause: str) -> None:
        if cause:
            self.failures.labels(cause=EVALUATION).inc()

    def resent(self, client_id: str, attempt: int, cause: str) -> None:
        self.resends.inc()

    def round_skipped(self, server_round: int, cause: str) -> None:
        self.skipped.inc()

    def round_finished(self, metrics: Mapping[str, object]) -> None:
        self._set_loss(ALL_CLASSES, "train", metrics.get("train_loss"))
        self._set_loss(ALL_CLASSES, self._split, metrics.get("eval_loss"))
        for name in self._classes:
            self._set_loss(name, self._split, metrics.get(f"eval_loss/{name}"))
        for direction, key in DIRECTIONS.items():
            self.bytes.labels(direction=direction).inc(_number(metrics.get(key)) or 0.0)
        self.moment.set_to_current_time()
        if metrics["round"]:
            self.rounds.inc()
            self.seconds.observe(_number(metrics.get("seconds")) or 0.0)

    def _set_loss(self, rank_class: str, split: str, value: object) -> None:
        number = _number(value)
        if number is not None:
            self.loss.labels(rank_class=rank_class, split=split).set(number)


def _number(value: object) -> float | None:
    """None where there is no number: a round without evaluation, a mean over no client."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        return None
    return float(value)


@contextmanager
def metrics_endpoint(config: Config) -> Iterator[list[PrometheusObserver]]:
    """The observer behind the endpoint, none where no port is given; it closes with the run.

    Raises:
        UserError: the port is taken or not allowed, or the host is no address of this machine.
    """
    port, host = config.server.metrics_port, config.server.metrics_host
    if port == 0:
        yield []
        return
    registry = CollectorRegistry()
    observer = PrometheusObserver(config, registry)
    with listening(host, port):
        server, thread = start_http_server(port, addr=host, registry=registry)
    try:
        yield [observer]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def listening(host: str, port: int) -> Iterator[None]:
    """Say in words why an endpoint cannot listen, and who reaches one that can.

    Raises:
        UserError: the port is taken or not allowed, or the host is no address of this machine.
    """
    try:
        yield
    except OSError as error:
        raise UserError(_refusal(host, port, error)) from None
    if not _is_loopback(host):
        LOG.warning("metrics are served on %s to whoever reaches port %d", host, port)


def _refusal(host: str, port: int, error: OSError) -> str:
    """One sentence: which key, what is wrong with it, what to do."""
    if error.errno == errno.EADDRINUSE:
        return (
            f"server.metrics-port is {port}, which another process listens on at {host}; "
            "give another port, or 0 for no endpoint."
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return (
            f"server.metrics-port is {port}, which needs rights to listen on; give one above 1023."
        )
    return (
        f"server.metrics-host is '{host}', which this machine cannot listen on "
        f"({error.strerror or error}); give one of its own addresses, such as 127.0.0.1."
    )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
