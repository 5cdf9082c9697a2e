"""What an engine was told, and what it says about itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from tunesmith.errors import RequestError

KvDtype = Literal["auto", "fp8"]
AttentionBackend = Literal["auto", "triton", "flash-attn-3", "flashinfer"]
_BACKENDS = get_args(AttentionBackend)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Bounds of the tokens of a step, as they are counted (EngineStats)."""


@dataclass(frozen=True)
class EngineConfig:
    """How much runs together, and how.

    max_num_seqs: requests that run at the same time.
    max_num_batched_tokens: tokens of one step, prompts and answers together; a longer prompt takes several steps.
    max_model_len: tokens of context, prompt and answer together.
    enable_prefix_cache: whether requests share the pages of equal beginnings.
    gpu_memory_utilization: the share of the GPU's memory that weights, activations, graphs and pages take together.
    kv_dtype: "auto" holds keys and values in the dtype of the stream; "fp8" in 8 bits with a scale per page and head.
    batch_invariant: greedy output is bit for bit the same whatever else is in the batch and in the cache. What it costs
        depends on the shape: builtin:tiny takes 2.4 times as long for one request on one core, 1.4 times for sixteen,
        3.8 times for prompts (measured 2026-11-23).
    debug_pages: count every page after every abort and every finished request.
    step_ahead: plan and launch a step before the tokens of the one before it are read.
    enforce_eager: no CUDA graphs.
    attention_backend: over pages on a GPU: "triton" is ours, "flash-attn-3" and "flashinfer" are other libraries';
        "auto" takes one of those where it is installed and was measured faster (attention_backends.py).
    """

    max_model_len: int
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    enable_prefix_cache: bool = True
    gpu_memory_utilization: float = 0.9
    kv_dtype: KvDtype = "auto"
    batch_invariant: bool = False
    debug_pages: bool = False
    step_ahead: bool = False
    enforce_eager: bool = False
    attention_backend: AttentionBackend = "auto"

    def __post_init__(self) -> None:
        rules = (
            ("max_model_len", self.max_model_len >= 2, "at least 2"),
            ("max_num_seqs", self.max_num_seqs >= 1, "at least 1"),
            ("max_num_batched_tokens", self.max_num_batched_tokens >= self.max_num_seqs, "at least max_num_seqs"),
            ("gpu_memory_utilization", 0 < self.gpu_memory_utilization <= 1, "above 0 and at most 1"),
            ("kv_cache_dtype", self.kv_dtype in ("auto", "fp8"), "'auto' or 'fp8'"),
            ("attention_backend", self.attention_backend in _BACKENDS, f"one of {', '.join(map(repr, _BACKENDS))}"),
        )
        for name, ok, allowed in rules:
            if not ok:
                got = getattr(self, "kv_dtype" if name == "kv_cache_dtype" else name)
                raise RequestError(f"{name} must be {allowed}, got {got!r}")


@dataclass(frozen=True)
class EngineStats:
    """The engine's state now, and what it has counted since it started.

    num_preempted: times that a running request had to give its pages back.
    pages_used: pages that running requests hold; the rest is free, though the prefix cache may still know its content.
    page_slots: tokens of a page.
    prefix_queries_tokens, prefix_hits_tokens: prompt tokens that were looked up in the prefix cache, and found there.
    prompt_tokens, generation_tokens: tokens of admitted prompts (those found in the cache too), and new tokens.
    last_step_s: seconds between the beginning and the end of the last step's work on the host.
    drafted_tokens, accepted_tokens: tokens that speculation guessed, and of these the right ones; num_drafts: guesses
        of one or several tokens that a step verified for a request.
    step_tokens: steps of at most as many tokens as each of STEP_TOKENS and not of the one before, and of more than all;
        step_tokens_sum: tokens of all steps, those of prompts and guesses too.
    running_adapters, waiting_adapters: names of the adapters that requests use, and that others wait for a turn with.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_preempted: int = 0
    pages_used: int = 0
    pages_total: int = 0
    page_slots: int = 0
    prefix_hits_tokens: int = 0
    prefix_queries_tokens: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    steps: int = 0
    last_step_s: float = 0.0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    num_drafts: int = 0
    num_finished: int = 0
    num_failed: int = 0
    kv_used_bytes: int = 0
    kv_reserved_bytes: int = 0
    step_tokens: tuple[int, ...] = ()
    step_tokens_sum: int = 0
    running_adapters: tuple[str, ...] = ()
    waiting_adapters: tuple[str, ...] = ()
