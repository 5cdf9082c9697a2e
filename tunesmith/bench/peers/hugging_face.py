"""Models of transformers as peers use them: PEFT's adapters, Liger's kernels, bitsandbytes' NF4."""

from __future__ import annotations

import gc
import importlib.util
from typing import Any

import torch
from torch import nn

from tunesmith.bench.peers.job import Job
from tunesmith.bench.peers.weights import fill, random_tensors, start_adapters
from tunesmith.bench.peers.wire import NotApplicableError, require
from tunesmith.model.lora import AdapterOptions


def attention_of(job: Job) -> str:
    """The fastest attention that transformers has here: flash_attn's where it is installed and fits, else torch's."""
    half = job.compute_dtype in (torch.bfloat16, torch.float16)
    if job.device.type == "cuda" and half and importlib.util.find_spec("flash_attn") is not None:
        return "flash_attention_2"
    return "sdpa"


def build(job: Job, *, liger: bool = False) -> Any:
    """The model of a job: weights, kernels, adapters, checkpointing.

    Raises: NotApplicableError for a method that the library does not have in a loop of its own.
    """
    if job.recipe.method.kind == "freeze" or job.recipe.method.adapter is not None:
        raise NotApplicableError("peers run full, lora and qlora from a fresh start")
    model = _random_model(job) if job.is_random else _loaded_model(job)
    model.config.use_cache = False
    if liger:
        from liger_kernel.transformers import (  # type: ignore[import-not-found,unused-ignore]
            _apply_liger_kernel_to_instance,
        )

        _apply_liger_kernel_to_instance(model=model)
    if job.has_adapters:
        model = adapt(model, job)
    else:
        train_all(model, job)
    if job.is_checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    gc.collect()
    return model


def _loaded_model(job: Job) -> Any:
    """The checkpoint, loaded as transformers loads it."""
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": job.base_dtype, "attn_implementation": attention_of(job)}
    if job.recipe.method.kind == "qlora":
        options["quantization_config"] = _nf4_config(job)
    if job.device.type == "cuda":
        options["device_map"] = {"": str(job.device)}
    return AutoModelForCausalLM.from_pretrained(job.directory, local_files_only=True, **options)


def _random_model(job: Job) -> Any:
    """The architecture with tunesmith's random weights, quantised afterwards for QLoRA."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(job.directory, local_files_only=True)
    with torch.device(job.device):
        model = AutoModelForCausalLM.from_config(config, dtype=job.base_dtype, attn_implementation=attention_of(job))
    fill(model, random_tensors(job.directory, job.base_dtype, job.device, job.recipe.train.seed))
    if job.recipe.method.kind == "qlora":
        quantise(model, job)
    return model


def _nf4_config(job: Job) -> Any:
    require("bitsandbytes", "bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=job.recipe.method.double_quantisation,
        bnb_4bit_compute_dtype=job.compute_dtype,
    )


def quantise(model: Any, job: Job) -> None:
    """Put bitsandbytes' NF4 linears in place of the linears of the blocks."""
    require("bitsandbytes", "bitsandbytes")
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in f".{path}.":
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, _nf4_linear(module, job))
    model.is_loaded_in_4bit = True  # PEFT asks for this


def _nf4_linear(linear: nn.Linear, job: Job) -> nn.Module:
    """The linear with its weight in NF4, on the same device; bitsandbytes quantises when a weight moves there."""
    import bitsandbytes as bnb

    has_bias = linear.bias is not None
    double = job.recipe.method.double_quantisation
    made = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, has_bias, job.compute_dtype, double, "nf4", device="meta"
    )
    made.weight = bnb.nn.Params4bit(
        linear.weight.detach(), requires_grad=False, quant_type="nf4", compress_statistics=double, module=made
    ).to(job.device)
    if has_bias:
        made.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
    return made


def adapt(model: Any, job: Job) -> Any:
    """PEFT's adapters with tunesmith's first values, in the job's dtype for what is trained."""
    require("peft", "peft")
    from peft import LoraConfig, get_peft_model

    method = job.recipe.method
    config = LoraConfig(
        r=method.rank,
        lora_alpha=_alpha(method.alpha),
        lora_dropout=method.dropout,
        use_rslora=method.rslora,
        use_dora=method.dora,
        target_modules=list(job.targets),
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    set_adapters(adapted, job)
    return adapted


def train_all(model: Any, job: Job) -> None:
    """Bring the whole model to the job's dtype; the row of the padding id is trained like any other, as ours is."""
    model.to(job.trained_dtype)
    model.get_input_embeddings().padding_idx = None


def set_adapters(model: nn.Module, job: Job) -> None:
    """Bring what is trained to the job's dtype, and to tunesmith's first values."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(job.trained_dtype)
    method = job.recipe.method
    options = AdapterOptions(method.rank, method.alpha, method.dropout, method.rslora, method.dora)
    if not start_adapters(model, job.directory, options, job.recipe.train.seed):
        raise RuntimeError("no adapter of this model has a name that is known: its first values can't be set")


def _alpha(alpha: float) -> float | int:
    """PEFT wants a whole number where it is one."""
    return int(alpha) if float(alpha).is_integer() else alpha
