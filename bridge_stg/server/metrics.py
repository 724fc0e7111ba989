"""The Prometheus metrics of one server, in a registry of their own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector
from prometheus_client.exposition import generate_latest

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
QUERIES = (1, 2, 4, 8, 16, 32, 64)
NAMESPACE = "bridge_stg"


class Metrics:
    """The metrics of one server; safe to use from many threads."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        counter = partial(Counter, namespace=NAMESPACE, registry=self.registry)
        histogram = partial(Histogram, namespace=NAMESPACE, registry=self.registry)
        self.requests = counter("requests", "Requests answered.", ["method", "route", "status"])
        self.errors = counter("errors", "HTTP errors and failed jobs.", ["code"])
        self.jobs = counter("jobs", "Jobs that ended.", ["outcome"])
        self.chat_tokens = counter("chat_tokens", "Tokens of the answers of chats.")
        self.uploaded = counter("uploaded_bytes", "Bytes of uploads written.")
        self.videos_opened = counter("videos_opened", "Videos whose prefix was computed.")
        self.videos_reused = counter("videos_reused", "Batches that reused a computed prefix.")
        self.live_updates = counter("live_updates", "Rounds of live queries.", ["source"])
        self.live_dropped = counter("live_dropped_frames", "Coarse frames dropped for later ones.", ["source"])
        self.live_skipped = counter("live_dropped_updates", "Updates that a slow client missed.", ["source"])
        live_seconds = (
            "live_latency_seconds",
            "Seconds from a live frame to its answers.",
        )
        self.live_latency = histogram(*live_seconds, ["source"], buckets=SECONDS)
        self.stages = histogram("stage_seconds", "Seconds per batch and stage.", ["stage"], buckets=SECONDS)
        self.job_seconds = histogram("job_seconds", "Seconds from a job's arrival to its end.", buckets=SECONDS)
        self.batch_queries = histogram("batch_queries", "Queries answered together.", buckets=QUERIES)

    def describe(self, **facts: str) -> None:
        """Add the metric `build_info`, which says by its labels what runs."""
        Info("build", "What runs.", namespace=NAMESPACE, registry=self.registry).info(facts)

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a gauge whose value is read with the metrics."""
        Gauge(name, text, namespace=NAMESPACE, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        """Return all metrics in the Prometheus text format."""
        return generate_latest(self.registry)
