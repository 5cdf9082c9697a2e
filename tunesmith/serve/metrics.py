"""Prometheus metrics. The names are those that dashboards for vLLM ask for, under our prefix or theirs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from tunesmith.serve.messages import End
from tunesmith.serve.pulse import TOKEN_S, TokenGaps

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SHORT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_LONG_S = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_GAUGES = {
    "num_requests_running": ("requests that run", "num_running"),
    "num_requests_waiting": ("requests that wait for their turn", "num_waiting"),
}
_COUNTERS = {
    "prefix_cache_queries": ("prompt tokens looked up in the prefix cache", "prefix_queries_tokens"),
    "prefix_cache_hits": ("prompt tokens found in the prefix cache", "prefix_hits_tokens"),
    "num_preemptions": ("times that a running request gave its pages back", "num_preempted"),
    "prompt_tokens": ("prompt tokens", "prompt_tokens"),
    "generation_tokens": ("generated tokens", "generation_tokens"),
    "engine_steps": ("steps of the engine", "steps"),
    "spec_decode_num_draft_tokens": ("tokens that speculation guessed", "drafted_tokens"),
    "spec_decode_num_accepted_tokens": ("guessed tokens that were right", "accepted_tokens"),
}


class EngineCollector:
    """The engine's own numbers. They begin anew when its process does; what is shown only grows."""

    def __init__(self, prefix: str, model: str) -> None:
        self.prefix = prefix
        self.labels = {"model_name": model, "engine": "0"}
        self.stats: Mapping[str, Any] = {}
        self.gaps = TokenGaps()
        self._before: dict[str, float] = {}

    def take(self, stats: Mapping[str, Any]) -> None:
        """The newest heartbeat."""
        if stats.get("steps", 0) < self.stats.get("steps", 0):
            for _, name in _COUNTERS.values():
                self._before[name] = self._before.get(name, 0) + self.stats.get(name, 0)
        self.stats = stats

    def _total(self, name: str) -> float:
        return float(self._before.get(name, 0) + self.stats.get(name, 0))

    def collect(self) -> Iterator[Metric]:
        """Called at each scrape."""
        names, values = list(self.labels), list(self.labels.values())
        for name, (text, key) in _GAUGES.items():
            gauge = GaugeMetricFamily(f"{self.prefix}:{name}", text, labels=names)
            gauge.add_metric(values, float(self.stats.get(key, 0)))
            yield gauge
        used = GaugeMetricFamily(f"{self.prefix}:kv_cache_usage_perc", "pages in use, 0 to 1", labels=names)
        used.add_metric(values, self.stats.get("pages_used", 0) / max(self.stats.get("pages_total", 0), 1))
        yield used
        for name, key in (("kv_cache_used_bytes", "kv_used_bytes"), ("kv_cache_reserved_bytes", "kv_reserved_bytes")):
            size = GaugeMetricFamily(f"{self.prefix}:{name}", "bytes of keys and values", labels=names)
            size.add_metric(values, float(self.stats.get(key, 0)))
            yield size
        for name, (text, key) in _COUNTERS.items():
            counter = CounterMetricFamily(f"{self.prefix}:{name}", text, labels=names)
            counter.add_metric(values, self._total(key))
            yield counter
        itl = HistogramMetricFamily(f"{self.prefix}:inter_token_latency_seconds", "time between tokens", labels=names)
        itl.add_metric(values, self.gaps.buckets(), self.gaps.sum_s)
        yield itl


class Metrics:
    """What the HTTP side counts, and the engine's numbers beside it."""

    def __init__(self, prefix: str, model: str) -> None:
        disable_created_metrics()
        self.registry = CollectorRegistry(auto_describe=False)
        self.engine = EngineCollector(prefix, model)
        self.registry.register(self.engine)
        labels = self.engine.labels

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Any:
            made = Histogram(f"{prefix}:{name}", text, list(labels), buckets=buckets, registry=self.registry)
            return made.labels(**labels)

        self.ttft = histogram("time_to_first_token_seconds", "arrival to the first token", _SHORT_S)
        self.tpot = histogram("request_time_per_output_token_seconds", "mean time of a later token", TOKEN_S)
        self.e2e = histogram("e2e_request_latency_seconds", "arrival to the end", _LONG_S)
        self.queue = histogram("request_queue_time_seconds", "waiting for a place", _LONG_S)
        self.inference = histogram("request_inference_time_seconds", "from a place to the end", _LONG_S)
        self.prefill = histogram("request_prefill_time_seconds", "from a place to the first token", _LONG_S)
        self.decode = histogram("request_decode_time_seconds", "from the first token to the end", _LONG_S)
        self.prompt = histogram("request_prompt_tokens", "prompt tokens of a request", _TOKENS)
        self.generated = histogram("request_generation_tokens", "generated tokens of a request", _TOKENS)
        self.success = Counter(
            f"{prefix}:request_success", "requests that ended, by reason", [*labels, "finished_reason"],
            registry=self.registry,
        )  # fmt: skip
        for reason in ("stop", "length", "abort", "error"):
            self.success.labels(**labels, finished_reason=reason)
        self.answers = Counter(
            f"{prefix}:http_responses", "HTTP answers, by status", [*labels, "status"], registry=self.registry
        )

    def finished(self, end: End) -> None:
        """Count an answer that ended; one that was aborted has no times."""
        labels = self.engine.labels
        self.success.labels(**labels, finished_reason=end.finish_reason).inc()
        if end.finish_reason == "abort":
            return
        self.prompt.observe(end.prompt_tokens)
        self.generated.observe(end.completion_tokens)
        self.e2e.observe(end.total_s)
        self.ttft.observe(end.ttft_s)
        self.queue.observe(end.queued_s)
        self.inference.observe(max(0.0, end.total_s - end.queued_s))
        self.prefill.observe(max(0.0, end.ttft_s - end.queued_s))
        self.decode.observe(max(0.0, end.total_s - end.ttft_s))
        if end.completion_tokens > 1:
            each_s = max(0.0, end.total_s - end.ttft_s) / (end.completion_tokens - 1)
            self.tpot.observe(each_s)

    def responded(self, status: int) -> None:
        """Count an HTTP answer."""
        self.answers.labels(**self.engine.labels, status=str(status)).inc()

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)
