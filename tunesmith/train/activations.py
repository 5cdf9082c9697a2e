"""What a recipe says of the blocks' activations, put into a model and checked before the first step."""

from __future__ import annotations

import logging

from tunesmith.cost.memory import offloaded_bytes
from tunesmith.errors import DeviceError, UnsupportedModelError
from tunesmith.hardware import available_memory_bytes
from tunesmith.model.decoder import Decoder
from tunesmith.model.language_model import LanguageModel
from tunesmith.recipe.schema import Recipe
from tunesmith.units import format_bytes

OFFLOADS = ("offload", "offload-block")
"""Kinds of train.checkpointing that move what is held to the host."""
_log = logging.getLogger(__name__)


def prepare_activations(model: LanguageModel, recipe: Recipe) -> None:
    """Tiles and offloading, for a model whose method is applied and a recipe that is resolved.

    Says how much host memory offloading takes, and where blocks can't have what was asked for.
    Raises: UnsupportedModelError where a block's MLP has no written-out form; DeviceError when the host has too
    little memory.
    """
    offloads, tile_tokens = recipe.train.checkpointing in OFFLOADS, recipe.train.mlp_tile_tokens
    if recipe.train.checkpointing == "selective-qkv" and isinstance(model, Decoder):
        _say_what_is_held(model)
    if not offloads and tile_tokens is None:
        return
    name = f"train.checkpointing '{recipe.train.checkpointing}'" if offloads else "train.mlp_tile_tokens"
    if not isinstance(model, Decoder) or not model.has_written_mlps:
        raise UnsupportedModelError(
            f"{name} needs blocks whose MLP is written out: a dense SwiGLU one of the native decoder, without "
            "adapter dropout where that is on a CPU or DoRA's; leave it out, and use --set train.checkpointing=block"
        )
    model.mlp_tile_tokens = tile_tokens
    if offloads:
        _check_host(model, recipe)


def _say_what_is_held(model: Decoder) -> None:
    """Say of how many blocks query, key and value are held after all."""
    had = model.checkpointing_by_block()
    if held := had.get("selective", 0):
        _log.warning(
            "train.checkpointing 'selective-qkv' is 'selective' in %d of %d blocks, whose query, key and value are "
            "held: it is for RMS norms and dense MLPs that are written out",
            held,
            sum(had.values()),
        )


def _check_host(model: Decoder, recipe: Recipe) -> None:
    train = recipe.train
    assert train.micro_batch_tokens is not None
    assert train.precision != "auto"
    inputs_only = train.checkpointing == "offload-block"
    spared = train.checkpointing_skip_last
    need = offloaded_bytes(model.config, recipe.method, train.micro_batch_tokens, train.precision, inputs_only, spared)
    free = available_memory_bytes()
    said = f"train.checkpointing '{train.checkpointing}' takes {format_bytes(need)} of pinned host memory"
    if need > free:
        raise DeviceError(
            f"{said}, and {format_bytes(free)} are free: lower train.micro_batch_tokens (it is "
            f"{train.micro_batch_tokens}), or use --set train.checkpointing=block"
        )
    _log.info("%s (%s are free)", said, format_bytes(free))
