"""Which Triton kernels a recipe will launch: its own step, taken down on the meta device, where nothing is computed.

The blocks of the model's real widths, the first, one in the middle and the last; forward, loss, backward, update. The
certificate's own run in float32 follows. Kernels that are launched for other shapes (a mixture's experts) are compiled
where they are launched.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from tunesmith.arch import ModelConfig, read_config
from tunesmith.checkpoint.source import resolve_model
from tunesmith.kernels.adamw import AdamWSettings, Updated, update
from tunesmith.kernels.grad_norm import global_norm
from tunesmith.kernels.nf4_weight import BLOCK
from tunesmith.kernels.warm_up import Launch, recorded
from tunesmith.model.decoder import Decoder
from tunesmith.model.methods import apply_method
from tunesmith.model.packed import packed
from tunesmith.model.quant import quantise_blocks, set_compute
from tunesmith.recipe.schema import Recipe
from tunesmith.train.adamw import LARGE_BYTES
from tunesmith.train.losses import cross_entropy_sum, head_of
from tunesmith.train.optimizers import make_optimizer
from tunesmith.train.resolve import DTYPES, default_tokens, trained_dtype, weight_dtype
from tunesmith.verify.invariance import LENGTHS
from tunesmith.verify.subject import reduced_config

META = torch.device("meta")
_CERTIFIED = 2_000_000_000
_DOCUMENTS = 2
_WHOLE = ("none", "block", "offload-block")
"""Checkpointing that makes nothing again inside a block."""


def launches_of(recipe: Recipe, *, has_bf16: bool = True, certified: bool = True) -> list[Launch]:
    """The launches of a step of `recipe` on a GPU, and of its certificate. Empty for families without native blocks."""
    decided = _decided(recipe, has_bf16)
    config = read_config(resolve_model(recipe.model.path, recipe.model.revision))
    if config.moe is not None:
        return []
    found = recorded(partial(_step, decided, _few_layers(config)))
    if certified and recipe.train.blocks == "fused":
        found += recorded(partial(_certified_step, decided, config))
    if certified and recipe.method.kind == "qlora":
        found += recorded(_quantise)
    return list({launch.key: launch for launch in found}.values())


def _decided(recipe: Recipe, has_bf16: bool) -> Recipe:
    """`resolve_recipe` for a GPU that this process does not ask."""
    train = recipe.train
    precision = ("bfloat16" if has_bf16 else "float32") if train.precision == "auto" else train.precision
    master = "float32" if train.master_weights == "auto" else train.master_weights
    tokens = train.micro_batch_tokens or default_tokens(recipe.data.max_length, torch.device("cuda"))
    values: dict[str, Any] = {"precision": precision, "master_weights": master, "micro_batch_tokens": tokens}
    decided = train.model_copy(update={**values, "learning_rate": train.learning_rate or 1e-4})
    model = recipe.model.model_copy(update={"dtype": weight_dtype(recipe, decided)})
    return recipe.model_copy(update={"train": decided, "model": model})


def _few_layers(config: ModelConfig) -> ModelConfig:
    """Three layers: a first and a last one may be held otherwise than the rest."""
    kept = min(3, config.num_hidden_layers)
    return replace(config, num_hidden_layers=kept, sliding_layers=())


def _model(recipe: Recipe, config: ModelConfig, dtype: torch.dtype) -> Decoder:
    """The recipe's model without storage, its method applied."""
    with META:
        decoder = Decoder(config).to(dtype)
    if recipe.method.quantisation is not None:
        quantise_blocks(decoder, recipe.method.quantisation)
    method = recipe.method.model_copy(update={"adapter": None})
    with META:
        apply_method(decoder, method, seed=0)
    decoder.to(META)
    return decoder


def _step(recipe: Recipe, config: ModelConfig) -> None:
    train = recipe.train
    model = _model(recipe, config, DTYPES[recipe.model.dtype])
    wide, compute = trained_dtype(train), DTYPES[train.precision]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(wide)
    model.compute_dtype = compute
    model.is_fused = train.blocks == "fused"
    model.checkpointing = "none" if train.checkpointing in _WHOLE else "selective"
    if model.is_fused and model.has_written_mlps:
        model.mlp_tile_tokens = train.mlp_tile_tokens
    assert train.micro_batch_tokens is not None
    _pass(model.train(), train.micro_batch_tokens, train.loss_chunk_tokens)
    _update(recipe, model)


def _certified_step(recipe: Recipe, config: ModelConfig) -> None:
    """`verify.blocks`: float32, products of the dequantised weights, few words."""
    frozen = recipe.method.kind in ("lora", "qlora")
    reduced = reduced_config(config, _CERTIFIED)
    model = _model(recipe, reduced, DTYPES[recipe.model.dtype] if frozen else torch.float32)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    set_compute(cast(nn.Module, model), "weights")
    model.compute_dtype = torch.float32
    model.is_fused = True
    model.checkpointing = "none" if recipe.train.checkpointing in _WHOLE else "selective"
    _pass(model.train(), sum(LENGTHS), recipe.train.loss_chunk_tokens)


def _pass(model: Decoder, num_tokens: int, chunk_tokens: int) -> None:
    """Forward, loss (once without a gradient) and backward of a micro-batch of two documents."""
    half = num_tokens // _DOCUMENTS
    tokens = torch.empty(num_tokens, dtype=torch.int64, device=META)
    hidden = model.hidden(packed(tokens, (half, num_tokens - half)))
    index = torch.empty(num_tokens - _DOCUMENTS, dtype=torch.int64, device=META)
    loss = partial(cross_entropy_sum, index=index, targets=index, head=head_of(model), chunk_tokens=chunk_tokens)
    with torch.no_grad():
        loss(hidden)  # as validation does
    loss(hidden).backward()


def _update(recipe: Recipe, model: Decoder) -> None:
    """The gradients' norm and the optimiser's update."""
    trained = [(name, p) for name, p in model.named_parameters() if p.grad is not None]
    global_norm([_gradient(parameter) for _, parameter in trained])
    if recipe.train.optimizer == "adamw8bit":
        make_optimizer(trained, recipe.train).step()
    elif recipe.train.optimizer == "adamw":
        _adamw(parameter.detach() for _, parameter in trained if parameter.nbytes > LARGE_BYTES)


def _adamw(large: Iterable[Tensor]) -> None:
    """torch's optimisers take no parameters of the meta device, so the kernel alone."""
    weights = list(large)
    if not weights:
        return
    scalar = torch.empty((), device=META)
    grads, means, squares = ([torch.empty_like(weight) for weight in weights] for _ in range(3))
    updated = Updated(weights, grads, means, squares, [scalar] * len(weights))
    update(updated, AdamWSettings(1e-4, (0.9, 0.999), 1e-8, 0.01), scalar, scalar)


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _quantise() -> None:
    """NF4's scales."""
    from tunesmith.kernels.nf4_triton import approximate_reciprocal

    for count in (16 * BLOCK, 16 * BLOCK + 1, 1):  # a launch knows whether a number is one, or a multiple of 16
        approximate_reciprocal(torch.empty(count, device=META))
