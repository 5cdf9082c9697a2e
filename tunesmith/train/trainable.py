"""The model of a recipe, ready to be trained: loaded, its method applied, its way of running chosen."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import nn

from tunesmith.checkpoint.adapter import load_adapter
from tunesmith.checkpoint.load import load_language_model
from tunesmith.checkpoint.source import resolve_model
from tunesmith.errors import UnsupportedModelError
from tunesmith.model.captured import CapturedBlocks
from tunesmith.model.decoder import Decoder
from tunesmith.model.language_model import LanguageModel
from tunesmith.model.methods import MethodSummary, apply_method
from tunesmith.parallel.mesh import Mesh
from tunesmith.parallel.tensor import shard_tensors
from tunesmith.recipe.schema import Recipe
from tunesmith.train import randomness
from tunesmith.train.activations import prepare_activations
from tunesmith.train.block_by_block import BlockByBlock, block_by_block, settle_dtypes
from tunesmith.train.resolve import DTYPES, trained_dtype
from tunesmith.watch.start_up import StartUp

Progress = Callable[[str, int, int], None]
"""(what is being done, how much of it is done, of how much)."""


def load_trainable(
    recipe: Recipe, progress: Progress | None = None, start_up: StartUp | None = None, mesh: Mesh | None = None
) -> tuple[LanguageModel, MethodSummary]:
    """The model of a resolved recipe with its method applied: what training begins with.

    mesh: the processes of the run; where some share tensors, this one has its part of them, and where they share
    weights by FSDP2, its shares of the blocks.
    """
    watch = StartUp() if start_up is None else start_up
    taker = block_by_block(recipe, mesh)
    with watch.part("weights"):
        randomness.seed_everything(recipe.train.seed)
        model = _load_model(recipe, progress, mesh, taker)
    with watch.part("method"):
        summary = _apply_method(model, recipe, taker)
        prepare_activations(model, recipe)
        if mesh is not None and isinstance(model, Decoder):
            shard_tensors(model, mesh)
    return model, summary


def _load_model(
    recipe: Recipe, progress: Progress | None, mesh: Mesh | None, taker: BlockByBlock | None
) -> LanguageModel:
    # Frozen layers: loaded wide, so that what stays trained loses nothing; the rest is narrowed afterwards.
    dtype = trained_dtype(recipe.train) if recipe.method.kind == "freeze" else DTYPES[recipe.model.dtype]
    model = load_language_model(
        recipe.model,
        quantize=recipe.method.quantisation,
        dtype=dtype,
        device=torch.device(recipe.model.device),
        seed=recipe.train.seed,
        progress=None if progress is None else partial(progress, "loading weights"),
        mesh=mesh,
        taker=taker,
    )
    model.compute_dtype = DTYPES[recipe.train.precision]
    model.checkpointing = recipe.train.checkpointing
    model.noise_alpha = recipe.train.neftune_alpha
    if isinstance(model, Decoder):
        model.is_fused = recipe.train.blocks == "fused"
        model.captured = _captured_blocks(recipe)
        model.skip_last = recipe.train.checkpointing_skip_last
    elif recipe.train.checkpointing_skip_last:
        raise UnsupportedModelError(
            "train.checkpointing_skip_last needs the native decoder; the transformers backend recomputes every block: "
            "use --set train.checkpointing_skip_last=0"
        )
    return model


def _captured_blocks(recipe: Recipe) -> CapturedBlocks | None:
    """CUDA graphs of the blocks, where the recipe wants them and nothing watches gradients as they come."""
    train = recipe.train
    if train.graphs == "off" or train.optimizer_in_backward or train.detect_anomaly:
        return None
    if not recipe.model.device.startswith("cuda"):
        return None
    captured = CapturedBlocks()
    captured.exclusive = train.accumulation == 1
    return captured


def _apply_method(model: LanguageModel, recipe: Recipe, taker: BlockByBlock | None) -> MethodSummary:
    gradual = taker if taker is not None and taker.has_taken else None
    summary = apply_method(model, recipe.method, seed=recipe.train.seed) if gradual is None else gradual.finish()
    if recipe.method.adapter is not None:
        base = resolve_model(recipe.model.path, recipe.model.revision)
        seed = recipe.train.seed if recipe.model.weights == "random" else None
        load_adapter(model, recipe.method.adapter, trainable=True, base_directory=base, random_seed=seed)
    if gradual is None:
        settle_dtypes(cast(nn.Module, model), recipe)
    return summary
