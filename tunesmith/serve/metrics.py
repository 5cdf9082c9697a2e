"""Prometheus metrics. The names are those that dashboards for vLLM ask for, under our prefix or theirs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from tunesmith.engine.config import STEP_TOKENS
from tunesmith.serve.mailbox import Choices
from tunesmith.serve.messages import End
from tunesmith.serve.options import EngineOptions
from tunesmith.serve.pulse import TOKEN_S, TokenGaps

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SHORT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_LONG_S = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_NUMBERS = (1, 2, 5, 10, 20)
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
    "spec_decode_num_drafts": ("guesses, of one or several tokens each, that a step verified", "num_drafts"),
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
        self.options = EngineOptions(model)
        self._before: dict[str, float] = {}
        self._steps_before = [0] * (len(STEP_TOKENS) + 1)

    def take(self, stats: Mapping[str, Any]) -> None:
        """The newest heartbeat."""
        if stats.get("steps", 0) < self.stats.get("steps", 0):
            for name in (*(name for _, name in _COUNTERS.values()), "step_tokens_sum"):
                self._before[name] = self._before.get(name, 0) + self.stats.get(name, 0)
            self._steps_before = self._steps()
        self.stats = stats

    def _steps(self) -> list[int]:
        """Steps by their tokens, of all engine processes."""
        counts: Sequence[int] = self.stats.get("step_tokens") or [0] * len(self._steps_before)
        return [before + now for before, now in zip(self._steps_before, counts, strict=True)]

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
        tokens = HistogramMetricFamily(f"{self.prefix}:iteration_tokens_total", "tokens of a step", labels=names)
        bounds = [*(str(float(bound)) for bound in STEP_TOKENS), "+Inf"]
        counts = map(float, accumulate(self._steps()))
        tokens.add_metric(values, list(zip(bounds, counts, strict=True)), self._total("step_tokens_sum"))
        yield tokens
        yield from self._infos()

    def _infos(self) -> Iterator[Metric]:
        """What the cache is, and which adapters have requests, as labels."""
        options, stats = self.options, self.stats
        if stats:
            yield self._info(
                "cache_config_info", "what the cache of keys and values is", 1.0,
                block_size=stats.get("page_slots", 0), num_gpu_blocks=stats.get("pages_total", 0),
                cache_dtype=options.kv_cache_dtype,
                gpu_memory_utilization=options.gpu_memory_utilization,
                enable_prefix_caching=options.enable_prefix_caching,
            )  # fmt: skip
        if options.more.get("enable_lora") and stats:
            yield self._info(
                "lora_requests_info", "adapters that requests run or wait with; the value is the time of it (Unix)",
                time.time(), max_lora=options.more["max_loras"],
                running_lora_adapters=",".join(stats.get("running_adapters", ())),
                waiting_lora_adapters=",".join(stats.get("waiting_adapters", ())),
            )  # fmt: skip

    def _info(self, name: str, text: str, value: float, **more: object) -> Metric:
        labels = {**self.labels, **{label: str(said) for label, said in more.items()}}
        family = GaugeMetricFamily(f"{self.prefix}:{name}", text, labels=list(labels))
        family.add_metric(list(labels.values()), value)
        return family


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
        self.longest = histogram("request_max_num_generation_tokens", "tokens of the longest of n answers", _TOKENS)
        self.asked_n = histogram("request_params_n", "answers that a request asked for, n", _NUMBERS)
        self.asked_tokens = histogram("request_params_max_tokens", "max_tokens of an answer", _TOKENS)
        self.success = Counter(
            f"{prefix}:request_success", "requests that ended, by reason", [*labels, "finished_reason"],
            registry=self.registry,
        )  # fmt: skip
        for reason in ("stop", "length", "abort", "error"):
            self.success.labels(**labels, finished_reason=reason)
        self.answers = Counter(
            f"{prefix}:http_responses", "HTTP answers, by status", [*labels, "status"], registry=self.registry
        )

    def finished(self, end: End, choices: Choices) -> None:
        """Count an answer that ended, one of these to its prompt; one that was aborted has no times."""
        labels = self.engine.labels
        self.success.labels(**labels, finished_reason=end.finish_reason).inc()
        self._chosen(end, choices)
        if end.finish_reason == "abort":
            return
        if choices.max_tokens is not None:
            self.asked_tokens.observe(choices.max_tokens)
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

    def _chosen(self, end: End, choices: Choices) -> None:
        """With the last of the answers to a prompt: how many they were, and how long the longest is."""
        choices.num_open -= 1
        choices.most_tokens = max(choices.most_tokens, end.completion_tokens)
        choices.is_cut |= end.finish_reason == "abort"
        if not choices.num_open and not choices.is_cut:
            self.asked_n.observe(choices.num)
            self.longest.observe(choices.most_tokens)

    def responded(self, status: int) -> None:
        """Count an HTTP answer."""
        self.answers.labels(**self.engine.labels, status=str(status)).inc()

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)
