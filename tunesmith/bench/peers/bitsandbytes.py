"""The peer transformers + PEFT on bitsandbytes' NF4: QLoRA as most people run it.

The norms, the embedding and the head stay in the recipe's dtype, as ours do: PEFT's own preparation would hold them,
and so the logits, in float32, which costs the peer memory and time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.bench.peers.wire import NotApplicableError, Say, require, serve


def run(mapping: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """Train the job's row."""
    require("bitsandbytes", "bitsandbytes")
    from tunesmith.bench.peers.hugging_face import attention_of, build
    from tunesmith.bench.peers.job import Job
    from tunesmith.bench.peers.loop import train

    job = Job.of(mapping)
    if job.recipe.method.kind != "qlora":
        raise NotApplicableError("the peer bitsandbytes runs QLoRA only")
    return train(build(job), job, say, {"attention": attention_of(job)})


if __name__ == "__main__":
    serve(run)
