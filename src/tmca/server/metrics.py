"""What Prometheus is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from tmca.server.messages import Measured

SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """Counters of one server.

    Args:
        waiting: Returns how many requests wait.
        ready: Returns whether requests are answered.
    """

    def __init__(self, waiting: Callable[[], int], ready: Callable[[], bool]) -> None:
        self.registry = CollectorRegistry()
        self._requests = Histogram(
            "tmca_request_seconds",
            "Duration of requests",
            ("method", "route", "status"),
            buckets=SECONDS,
            registry=self.registry,
        )
        self._batches = Histogram(
            "tmca_batch_questions",
            "Sentences answered together",
            buckets=(1, 2, 4, 8, 16, 32),
            registry=self.registry,
        )
        self._compute = Histogram(
            "tmca_batch_seconds", "Duration of a batch's computation", buckets=SECONDS, registry=self.registry
        )
        self._encoded = Counter("tmca_images_encoded", "Images encoded", registry=self.registry)
        self._remembered = Counter("tmca_images_remembered", "Images encoded before", registry=self.registry)
        self._restarts = Counter("tmca_worker_restarts", "Workers that died", registry=self.registry)
        self._jobs = Gauge("tmca_jobs", "Jobs by state", ("status",), registry=self.registry)
        Gauge("tmca_requests_waiting", "Requests that wait", registry=self.registry).set_function(waiting)
        Gauge("tmca_ready", "1 while requests are answered", registry=self.registry).set_function(
            lambda: float(ready())
        )

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(method if method in _METHODS else "other", route, status).observe(seconds)

    def measured(self, measured: Measured) -> None:
        """Count a batch."""
        self._batches.observe(measured.questions)
        self._compute.observe(measured.seconds)
        self._encoded.inc(measured.encoded)
        self._remembered.inc(measured.remembered)

    def restarted(self) -> None:
        """Count a worker that died."""
        self._restarts.inc()

    def text(self, jobs: Mapping[str, int]) -> bytes:
        """Return everything in Prometheus' text format.

        Args:
            jobs: State → number.
        """
        for status, count in jobs.items():
            self._jobs.labels(status).set(count)
        return generate_latest(self.registry)


_METHODS = ("GET", "HEAD", "POST", "DELETE", "OPTIONS")
