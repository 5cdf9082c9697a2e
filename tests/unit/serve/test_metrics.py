"""What /metrics says: the names that vLLM's dashboards ask for, and that each is measured."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

from serve_fakes import Served, in_server

from tunesmith.engine.config import STEP_TOKENS, EngineStats
from tunesmith.serve.metrics import Metrics
from tunesmith.serve.options import EngineOptions

LABELS = '{engine="0",model_name="tiny"}'
HISTOGRAMS = ("e2e_request_latency_seconds", "inter_token_latency_seconds", "time_to_first_token_seconds")
QUERIED = (
    *(f"{name}_{part}" for name in HISTOGRAMS for part in ("bucket", "sum", "count")),
    "prompt_tokens_total", "generation_tokens_total", "num_requests_running", "num_requests_waiting",
    "kv_cache_usage_perc", "request_prompt_tokens_bucket", "request_generation_tokens_bucket",
    "request_success_total", "request_queue_time_seconds_sum", "request_prefill_time_seconds_sum",
    "request_decode_time_seconds_sum", "request_max_num_generation_tokens_sum",
    "spec_decode_num_drafts_total", "spec_decode_num_draft_tokens_total", "spec_decode_num_accepted_tokens_total",
)  # fmt: skip
"""Of the panels of vLLM's Grafana dashboard, and of its dashboard of speculation but for acceptance by position."""
DOCUMENTED = (
    "iteration_tokens_total_bucket", "iteration_tokens_total_sum", "request_params_n_bucket",
    "request_params_max_tokens_bucket", "cache_config_info", "lora_requests_info", "prefix_cache_queries_total",
    "prefix_cache_hits_total", "num_preemptions_total", "request_inference_time_seconds_sum",
    "request_time_per_output_token_seconds_sum",
)  # fmt: skip


def with_adapters(metrics: Metrics) -> None:
    metrics.engine.options = EngineOptions("tiny", more={"enable_lora": True, "max_loras": 8})


def value(text: str, name: str, labels: str = LABELS) -> float:
    found = re.search(rf"^vllm:{name}{re.escape(labels)} (\S+)$", text, re.MULTILINE)
    assert found is not None, (name, text)
    return float(found[1])


@in_server(metrics_prefix="vllm")
async def test_every_metric_that_the_dashboards_ask_for_is_there(one: Served) -> None:
    with_adapters(one.server.metrics)
    await one.chat()
    await one.until(lambda: one.server.engine.pulse.stats.get("prompt_tokens"))
    text = (await one.client.get("/metrics")).text
    names = {line.partition("{")[0] for line in text.splitlines() if not line.startswith("#")}
    assert not {f"vllm:{name}" for name in (*QUERIED, *DOCUMENTED)} - names
    assert all('model_name="tiny"' in line for line in text.splitlines() if not line.startswith("#"))


@in_server(metrics_prefix="vllm")
async def test_answers_to_one_prompt_are_one_request(one: Served) -> None:
    talk = {"max_tokens": 3, "temperature": 0}
    assert (await one.chat(n=3, **talk)).status_code == 200
    assert (await one.post("/v1/completions", prompt=["a", "b"], n=2, max_tokens=5)).status_code == 200
    assert (await one.chat(**talk)).status_code == 200
    text = one.server.metrics.render().decode()
    assert value(text, "request_params_n_count") == 4 and value(text, "request_params_n_sum") == 3 + 2 + 2 + 1
    assert value(text, "request_max_num_generation_tokens_count") == 4
    assert value(text, "request_max_num_generation_tokens_sum") == 3 + 5 + 5 + 3
    assert value(text, "request_params_max_tokens_count") == 8
    assert value(text, "request_params_max_tokens_sum") == 3 * 3 + 4 * 5 + 3
    assert value(text, "request_params_n_bucket", '{engine="0",le="2.0",model_name="tiny"}') == 3


def counts(**by_bound: int) -> tuple[int, ...]:
    found = [0] * (len(STEP_TOKENS) + 1)
    for bound, count in by_bound.items():
        found[STEP_TOKENS.index(int(bound[1:]))] = count
    return tuple(found)


def test_the_engine_s_own_numbers_go_on_when_its_process_is_another() -> None:
    metrics = Metrics("vllm", "tiny")
    with_adapters(metrics)

    def render(**stats: Any) -> str:
        metrics.engine.take(asdict(EngineStats(**stats)))
        return metrics.render().decode()

    first = render(steps=5, step_tokens=counts(b1=3, b64=2), step_tokens_sum=90, pages_total=7, page_slots=16)
    assert value(first, "iteration_tokens_total_count") == 5 and value(first, "iteration_tokens_total_sum") == 90
    assert value(first, "iteration_tokens_total_bucket", '{engine="0",le="32.0",model_name="tiny"}') == 3
    cache = '{block_size="16",cache_dtype="auto",enable_prefix_caching="True",engine="0",'
    cache += 'gpu_memory_utilization="0.9",model_name="tiny",num_gpu_blocks="7"}'
    assert value(first, "cache_config_info", cache) == 1
    second = render(
        steps=1, step_tokens=counts(b8=1), step_tokens_sum=4, running_adapters=("a", "b"), waiting_adapters=("c",)
    )
    assert value(second, "iteration_tokens_total_count") == 6 and value(second, "iteration_tokens_total_sum") == 94
    adapters = '{engine="0",max_lora="8",model_name="tiny",running_lora_adapters="a,b",waiting_lora_adapters="c"}'
    assert value(second, "lora_requests_info", adapters) > 1.7e9
    assert second.count("vllm:lora_requests_info{") == 1


def test_there_are_no_adapters_where_none_can_be_loaded() -> None:
    metrics = Metrics("vllm", "tiny")
    metrics.engine.take(asdict(EngineStats(steps=1)))
    assert "lora_requests_info" not in metrics.render().decode()
