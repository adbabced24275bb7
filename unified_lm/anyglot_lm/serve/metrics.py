"""What a server counts, for Prometheus: requests, times, tokens by modality, rows and queue, answers that were left."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from prometheus_client import (
    CONTENT_TYPE_LATEST as CONTENT_TYPE_LATEST,
)
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The counters of one server, in a registry of its own.

    Args:
        in_flight: gives the number of answers that are being written.
        waiting: gives the number of those that wait for that.
    """

    def __init__(self, in_flight: Callable[[], float], waiting: Callable[[], float]) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "anyglot_requests_total", "Requests by path and status", ["path", "status"], registry=registry
        )
        self.seconds = Histogram(
            "anyglot_request_seconds", "Time to the end of the response", ["path"], buckets=SECONDS, registry=registry
        )
        self.first = Histogram(
            "anyglot_first_byte_seconds", "Time to its first byte", ["path"], buckets=SECONDS, registry=registry
        )
        self._tokens = Counter(
            "anyglot_tokens_total", "Ids of prompts and answers", ["direction", "modality"], registry=registry
        )
        self.errors = Counter("anyglot_errors_total", "Defects of the server, see its log", registry=registry)
        self.left = Counter("anyglot_cancelled_total", "Answers that nobody waited for any more", registry=registry)
        Gauge("anyglot_rows_in_flight", "Answers being written", registry=registry).set_function(in_flight)
        Gauge("anyglot_queue_length", "Answers that wait for that", registry=registry).set_function(waiting)

    def tokens(self, direction: Literal["prompt", "answer"], counts: Mapping[str, int]) -> None:
        """Counts ids by modality."""
        for modality, count in counts.items():
            self._tokens.labels(direction, modality).inc(count)

    def page(self) -> bytes:
        """The exposition."""
        return generate_latest(self.registry)
