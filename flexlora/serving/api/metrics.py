"""Prometheus metrics of a server: the engine's counts as they are read, and times of answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from flexlora.serving.limits import Stats

__all__ = ["CONTENT_TYPE_LATEST", "Metrics"]

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
GAUGES = {
    "running": "Requests that share the engine's passes",
    "waiting": "Requests in the queue",
    "adapters": "Adapters by name",
    "adapters_on_device": "Adapters whose factors are on the device",
    "adapter_bytes": "Bytes of adapters on the device",
    "cache_bytes": "Bytes of keys and values that are reserved",
    "cache_bytes_used": "Bytes of keys and values of running requests",
}
COUNTERS = {
    "steps": "Passes of the model",
    "prompt_tokens": "Tokens of prompts that were computed",
    "answer_tokens": "Tokens of answers",
    "finished": "Requests that ended with stop or length",
    "cancelled": "Requests that were cancelled: client gone, time over, server stopping",
    "failed": "Requests that ended with an error",
    "adapter_loads": "Adapters copied to the device",
    "adapter_evictions": "Adapters that made room for others",
}
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics")
PREFIX = "flexlora_serving_"


class _EngineCounts(Collector):
    def __init__(self, stats: Callable[[], Stats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(PREFIX + name, text, value=getattr(stats, name))
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(PREFIX + name, text, value=getattr(stats, name))


class Metrics:
    """One registry per server; ``stats`` are the engine's."""

    def __init__(self, stats: Callable[[], Stats]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCounts(stats))
        self.first_token = Histogram(
            PREFIX + "time_to_first_token_seconds",
            "From the arrival of a request to its first token",
            buckets=SECONDS,
            registry=self._registry,
        )
        self.call_seconds = Histogram(
            PREFIX + "call_seconds",
            "From the arrival of a call to the end of its answer",
            buckets=SECONDS,
            registry=self._registry,
        )
        self._calls = Counter(
            PREFIX + "calls",
            "Calls by path and outcome: an HTTP status, or hung_up",
            ("path", "outcome"),
            registry=self._registry,
        )

    def count(self, path: str, outcome: str) -> None:
        """One call more; paths that clients make up share one label."""
        self._calls.labels(path if path in PATHS else "other", outcome).inc()

    def page(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self._registry)
