"""The peer Unsloth, through its own loader, with its offloaded kind of checkpointing.

It patches transformers when it is imported, so it comes before everything that imports transformers. Its loader wants
a checkpoint with a tokenizer: `prepare` writes one where the weights are random. It starts on a GPU only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.bench.peers.wire import NotApplicableError, Say, require, serve

if TYPE_CHECKING:
    from tunesmith.bench.peers.job import Job


def run(mapping: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """Train the job's row."""
    require("unsloth", "unsloth")
    if mapping["recipe"]["model"]["device"] == "cpu":
        raise NotApplicableError("unsloth runs on a GPU only")
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    os.environ["UNSLOTH_COMPILE_LOCATION"] = str(Path(mapping["batches"]).parent / "unsloth_compiled_cache")
    from unsloth import FastLanguageModel  # type: ignore[import-not-found,unused-ignore] # isort: skip

    from tunesmith.bench.peers.job import Job
    from tunesmith.bench.peers.loop import train

    job = Job.of(mapping)
    if job.recipe.method.kind == "freeze" or job.recipe.method.adapter is not None:
        raise NotApplicableError("peers run full, lora and qlora from a fresh start")
    model = build(FastLanguageModel, job)
    return train(model, job, say, {"attention": str(getattr(model.config, "_attn_implementation", None))})


def build(library: Any, job: Job) -> Any:
    """The model of a job by Unsloth's `FastLanguageModel`."""
    checkpointing = "unsloth" if job.is_checkpointed else False
    model, _ = library.from_pretrained(
        str(job.checkpoint or job.directory),
        max_seq_length=job.recipe.data.max_length,
        dtype=job.compute_dtype,
        load_in_4bit=job.recipe.method.kind == "qlora",
        full_finetuning=not job.has_adapters,
        use_gradient_checkpointing=checkpointing,
        local_files_only=True,
    )
    from tunesmith.bench.peers.hugging_face import set_adapters, train_all

    if not job.has_adapters:
        train_all(model, job)
        return model
    method = job.recipe.method
    model = library.get_peft_model(
        model,
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        bias="none",
        target_modules=list(job.targets),
        use_rslora=method.rslora,
        use_gradient_checkpointing=checkpointing,
        random_state=job.recipe.train.seed,
    )
    set_adapters(model, job)
    return model


if __name__ == "__main__":
    serve(run)
