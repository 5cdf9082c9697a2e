"""The peer transformers + PEFT: `python -m tunesmith.bench.peers.transformers`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.bench.peers.wire import NotApplicableError, Say, require, serve


def run(mapping: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """Train the job's row."""
    require("transformers", "transformers")
    from tunesmith.bench.peers.hugging_face import attention_of, build
    from tunesmith.bench.peers.job import Job
    from tunesmith.bench.peers.loop import train

    job = Job.of(mapping)
    if job.recipe.method.kind == "qlora":
        raise NotApplicableError("transformers' QLoRA is the peer bitsandbytes")
    return train(build(job), job, say, {"attention": attention_of(job)})


if __name__ == "__main__":
    serve(run)
