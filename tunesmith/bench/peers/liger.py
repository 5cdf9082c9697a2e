"""The peer transformers + PEFT + Liger's kernels (on bitsandbytes' NF4 for QLoRA)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.bench.peers.wire import Say, require, serve


def run(mapping: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """Train the job's row."""
    require("liger_kernel", "liger-kernel")
    from tunesmith.bench.peers.hugging_face import attention_of, build
    from tunesmith.bench.peers.job import Job
    from tunesmith.bench.peers.loop import train

    job = Job.of(mapping)
    return train(build(job, liger=True), job, say, {"attention": attention_of(job)})


if __name__ == "__main__":
    serve(run)
