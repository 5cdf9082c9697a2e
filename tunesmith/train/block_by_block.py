"""A model too large for one process: a block is loaded, adapted and sharded before the next is loaded.

    read or draw  ->  quantise  ->  adapters  ->  dtypes  ->  FSDP2         one block
    the same for the next, into the memory that the whole form of this one has left

At no time does a process hold more than its share of the blocks that came, one block whole, and what is outside the
blocks, which is whole in every forward pass anyway.
"""

from __future__ import annotations

import torch
from torch import nn

from tunesmith.errors import ModelError, UnsupportedModelError
from tunesmith.model.decoder import Decoder
from tunesmith.model.lora import AdaptedLinear
from tunesmith.model.methods import GradualMethod, MethodSummary
from tunesmith.parallel.apply import full_shard
from tunesmith.parallel.full_shard import FullShard
from tunesmith.parallel.mesh import Mesh
from tunesmith.recipe.schema import Recipe
from tunesmith.train.resolve import DTYPES, trained_dtype


class BlockByBlock:
    """Takes a decoder's blocks as they are loaded. A block that is sharded here is found so by `spread_out` later."""

    def __init__(self, recipe: Recipe, cut: FullShard) -> None:
        self._recipe, self._cut = recipe, cut
        self._decoder: Decoder | None = None
        self._method: GradualMethod | None = None

    def prepare(self, decoder: Decoder) -> None:
        """Choose what is trained; the decoder is on the meta device.

        Raises: ModelError for a method that this model can't be trained by (no reason to take another library's model,
        as an UnsupportedModelError is while a model is loaded); RecipeError.
        """
        self._decoder = decoder
        try:
            self._method = GradualMethod(decoder, self._recipe.method, seed=self._recipe.train.seed)
        except UnsupportedModelError as error:
            raise ModelError(str(error)) from None

    def take(self, layer: int) -> None:
        """Finish a block and keep this process's share of it."""
        assert self._decoder is not None and self._method is not None
        self._method.block(layer)
        block = self._decoder.blocks[layer]
        settle_dtypes(block, self._recipe)
        self._cut.block(block, adapter_parameters(block))

    @property
    def has_taken(self) -> bool:
        """Whether there were blocks: a model of another library has none to take."""
        return self._decoder is not None

    def finish(self) -> MethodSummary:
        """What is outside the blocks gets its dtypes too. Returns what the method made of the model."""
        if self._decoder is None or self._method is None:
            raise ModelError("no block was loaded: set model.backend to native")
        for name, child in self._decoder.named_children():
            if name != "blocks":
                settle_dtypes(child, self._recipe)
        return self._method.summary()


def block_by_block(recipe: Recipe, mesh: Mesh | None) -> BlockByBlock | None:
    """For a resolved recipe whose processes share weights by FSDP2; None where each holds what it loads.

    Processes that share matrices load their part of each anyway, and so do the stages of a pipeline.
    """
    parallel = recipe.parallel
    if mesh is None or parallel.engine != "native" or mesh.size("tp") * mesh.size("pp") > 1:
        return None
    has_adapters = recipe.method.kind in ("lora", "qlora")
    cut = full_shard(mesh, parallel, DTYPES[recipe.train.precision], has_adapters=has_adapters)
    return None if cut is None else BlockByBlock(recipe, cut)


def adapter_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of all adapters below a module."""
    adapted = [child for child in module.modules() if isinstance(child, AdaptedLinear)]
    return [parameter for child in adapted for parameter in child.adapters.parameters()]


@torch.no_grad()
def settle_dtypes(module: nn.Module, recipe: Recipe) -> None:
    """Trained parameters as masters; frozen layers, which were loaded as wide as those, in the compute dtype."""
    wide, narrow = trained_dtype(recipe.train), DTYPES[recipe.train.precision]
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(wide)
        elif recipe.method.kind == "freeze" and parameter.is_floating_point():
            parameter.data = parameter.data.to(narrow)
