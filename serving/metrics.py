"""What /metrics shows, in Prometheus' text format: the scheduler's counts, and latencies as histograms."""

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from inference.scheduler import Handle, Scheduler

GAUGES = {
    "waiting": ("requests_waiting", "Requests in the queue"),
    "running": ("requests_running", "Requests in the running batch"),
    "rows": ("rows_taken", "Rows of the cache that are taken"),
}
COUNTERS = {
    "requests": ("requests", "Requests accepted"),
    "finished": ("requests_finished", "Requests answered to their end"),
    "cancelled": ("requests_cancelled", "Requests whose client left, or that took too long"),
    "failed": ("requests_failed", "Requests ended by a fault of the server"),
    "refused": ("requests_refused", "Requests refused because the queue was full"),
    "prompt_tokens": ("prompt_tokens", "Tokens of prompts"),
    "new_tokens": ("generated_tokens", "Tokens generated"),
    "steps": ("steps", "Forward steps of the batch"),
}
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class SchedulerCollector:
    """Reads the scheduler's counts each time that /metrics is asked for, so nothing has to be counted twice."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler

    def collect(self):
        stats = self.scheduler.stats()
        for key, (name, text) in GAUGES.items():
            yield GaugeMetricFamily(f"minimind_{name}", text, value=stats[key])
        for key, (name, text) in COUNTERS.items():
            yield CounterMetricFamily(f"minimind_{name}", text, value=stats[key])
        yield GaugeMetricFamily("minimind_rows", "Rows of the cache", value=self.scheduler.slots)


class Metrics:
    """It has a registry of its own, so that the figures of two servers in one process do not mix."""

    def __init__(self, scheduler: Scheduler):
        self.registry = CollectorRegistry()
        self.registry.register(SchedulerCollector(scheduler))

        def seconds(name: str, text: str) -> Histogram:
            return Histogram(f"minimind_{name}_seconds", text, buckets=SECONDS, registry=self.registry)

        self.first_token = seconds("first_token", "From the request to its first token")
        self.next_token = seconds("next_token", "Between two tokens, mean of a request")
        self.request = seconds("request", "From the request to its last token")
        self.responses = Counter(
            "minimind_http_responses", "HTTP responses by status", ["status"], registry=self.registry
        )

    def observe(self, handle: Handle) -> None:
        """Notes the latencies of a request that has ended. A cancelled one shows in the scheduler's counts only."""
        if handle.cancelled or not handle.finished or not handle.first_token:
            return
        tokens = max(len(sample.token_ids) for sample in handle.samples)
        self.first_token.observe(handle.first_token - handle.submitted)
        self.request.observe(handle.finished - handle.submitted)
        if tokens > 1:
            self.next_token.observe((handle.finished - handle.first_token) / (tokens - 1))

    def count(self, status: int) -> None:
        self.responses.labels(status).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)
