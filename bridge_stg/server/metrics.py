"""What Prometheus may read of a server. Every server has a registry of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
QUERIES = (1, 2, 4, 8, 16, 32, 64)
PREFIX = "bridge_stg_"


class Metrics:
    """The counters of one server; safe to use from many threads."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(PREFIX + name, text, labels, registry=registry)

        self.requests = counter("requests", "Requests answered.", ("method", "route", "status"))
        self.refused = counter("refused", "Requests and jobs that were refused or failed.", ("reason",))
        self.jobs = counter("jobs", "Jobs that ended.", ("outcome",))
        self.uploaded = counter("uploaded_bytes", "Bytes of uploads written.")
        self.videos_opened = counter("videos_opened", "Videos whose prefix was computed.")
        self.videos_reused = counter("videos_reused", "Batches that found their video's prefix computed.")
        self.live_updates = counter("live_updates", "Rounds of standing queries.", ("source",))
        self.live_dropped = counter("live_dropped_frames", "Coarse frames that gave way to later ones.", ("source",))
        self.live_skipped = counter("live_dropped_updates", "Updates that a slow client missed.", ("source",))
        self.stages = Histogram(
            PREFIX + "stage_seconds", "Seconds of a batch by stage.", ("stage",), buckets=SECONDS, registry=registry
        )
        self.job_seconds = Histogram(
            PREFIX + "job_seconds", "From a job's arrival to its end.", buckets=SECONDS, registry=registry
        )
        self.batch_queries = Histogram(
            PREFIX + "batch_queries", "Queries answered together.", buckets=QUERIES, registry=registry
        )

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Show a number that is asked for when the metrics are read."""
        Gauge(PREFIX + name, text, registry=self.registry).set_function(value)

    def observe_stages(self, timings: Mapping[str, float]) -> None:
        """Count the seconds of one batch by stage."""
        for stage, seconds in timings.items():
            self.stages.labels(stage).observe(seconds)

    def text(self) -> bytes:
        """Return everything in the Prometheus text format."""
        return generate_latest(self.registry)
