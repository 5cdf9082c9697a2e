"""The peer TRL: its SFTTrainer's own loop around transformers + PEFT (with Liger's kernels where they are installed).

A step lasts from the end of the one before to its own end, the trainer's bookkeeping included: that is what its user
waits for. Losses and norms are taken where the trainer has them, on the device: its log would wait for them. What the
trainer itself reads of every micro-batch (entropy, accuracy, token counts) it waits for, and the row says so. An index
stands for a micro-batch, so that the trainer sees the same ids in the same order as everybody.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tunesmith.bench.peers.wire import NotApplicableError, Say, require, serve

WAITS = "its trainer reads entropy, accuracy and token counts from the device in every micro-batch, which waits"


def run(mapping: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """Train the job's row."""
    require("trl", "trl")
    require("datasets", "datasets")
    require("accelerate", "accelerate")
    from tunesmith.bench.peers.hugging_face import attention_of, build
    from tunesmith.bench.peers.job import Job

    job = Job.of(mapping)
    if job.recipe.train.optimizer != "adamw":
        raise NotApplicableError("the peer trl runs torch's fused AdamW only")
    liger = job.device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None
    waits = WAITS if job.device.type == "cuda" else None
    facts = {"attention": attention_of(job), "liger": liger, "autocast": job.needs_autocast, "waits": waits}
    with tempfile.TemporaryDirectory() as scratch:
        return {**_train(build(job), job, say, Path(scratch), liger), **facts}


def _train(model: Any, job: Any, say: Say, scratch: Path, liger: bool) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found,unused-ignore]

    from tunesmith.bench.peers.loop import Recorder, dtypes_of, host_steps

    steps, first_digest = host_steps(job)
    batches = [_with_mask(inputs) for step in steps for inputs in step.inputs]
    recorder = Recorder(job, say)
    losses: list[Any] = []
    norms: list[Any] = []

    class Trainer(SFTTrainer):  # type: ignore[misc,unused-ignore]
        """Keeps the loss of every micro-batch, on the device."""

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            losses.append(loss)
            return loss

    class Clock(TrainerCallback):  # type: ignore[misc,unused-ignore]
        """Takes a step's end, its loss and its norm."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            recorder.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            recorder.end(sum(losses[1:], losses[0]), norms[-1])
            losses.clear()
            recorder.begin()

    trainer = Trainer(
        model=model,
        args=SFTConfig(output_dir=str(scratch), use_liger_kernel=liger, **_settings(job, len(steps))),
        train_dataset=Dataset.from_dict({"input_ids": [[index] for index in range(len(batches))]}),
        data_collator=lambda rows: dict(batches[rows[0]["input_ids"][0]]),
        processing_class=AutoTokenizer.from_pretrained(_tokenizer_directory(job)),
        callbacks=[Clock()],
    )
    trainer.accelerator.clip_grad_norm_ = _keeping(trainer.accelerator.clip_grad_norm_, norms)
    trainer.create_optimizer()
    _set_rates(trainer, job.rates)
    trainer.train()
    return {
        **recorder.finish(),
        **dtypes_of(model, trainer.optimizer),
        "digest": first_digest,
        "tokens": [step.num_tokens for step in steps],
        "trained_tokens": [step.num_trained for step in steps],
    }


def _keeping(clip: Callable[..., Any], norms: list[Any]) -> Callable[..., Any]:
    """`clip`, which returns the norm of all gradients before it clips them; the norm is kept."""

    def clip_and_keep(*args: Any, **kwargs: Any) -> Any:
        norms.append(clip(*args, **kwargs))
        return norms[-1]

    return clip_and_keep


def _with_mask(inputs: dict[str, Any]) -> dict[str, Any]:
    """The trainer wants a mask, or positions, where transformers needs neither."""
    import torch

    if "position_ids" in inputs:
        return inputs
    return {"attention_mask": torch.ones_like(inputs["input_ids"]), **inputs}


def _settings(job: Any, num_steps: int) -> dict[str, Any]:
    """The recipe in the trainer's words. The model is adapted and checkpointed already."""
    train = job.recipe.train
    return {
        "max_steps": num_steps,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": train.accumulation,
        "learning_rate": max(job.rates),
        "adam_beta1": train.beta1,
        "adam_beta2": train.beta2,
        "adam_epsilon": train.eps,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "optim": "adamw_torch_fused",
        "bf16": str(job.compute_dtype) == "torch.bfloat16" and job.needs_autocast,
        "fp16": False,
        "use_cpu": job.device.type == "cpu",
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "dataloader_pin_memory": False,  # they are page-locked already
        "accelerator_config": {"non_blocking": job.device.type == "cuda"},
        "gradient_checkpointing": job.is_checkpointed,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,  # it would wait for every loss
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": train.seed,
    }


def _set_rates(trainer: Any, rates: tuple[float, ...]) -> None:
    """The very learning rates of the recipe, as a schedule."""
    import torch

    peak = max(rates) or 1.0
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
        trainer.optimizer, lambda step: rates[min(step, len(rates) - 1)] / peak
    )


def _tokenizer_directory(job: Any) -> Path:
    """The model's tokenizer where it has one; else the embedded one, which no id goes through."""
    from tunesmith.checkpoint.source import resolve_model

    has_one = (job.directory / "tokenizer_config.json").is_file()
    return Path(job.directory) if has_one else resolve_model("builtin:tiny")


if __name__ == "__main__":
    serve(run)
