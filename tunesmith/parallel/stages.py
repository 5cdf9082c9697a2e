"""A decoder cut into the stages of a pipeline: consecutive blocks, as equal in work as they can be.

    first stage   tokens -> embedding -> blocks 0 .. a    stream [T, D]
    middle        stream -> blocks a .. b                 stream
    last          stream -> blocks b .. L -> norm -> head losses

A module that another stage holds is replaced by one without parameters, so that every name and every block's number
stay those of the whole decoder. A tied head is the embedding: the first and the last stage hold a copy each.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from tunesmith.arch import ModelConfig
from tunesmith.cost.flops import block_forward_flops, head_flops
from tunesmith.errors import ParallelError
from tunesmith.model.block import Block
from tunesmith.model.decoder import Decoder
from tunesmith.parallel.mesh import Mesh

TIED = "embedding.weight"
"""What both ends hold where the head is tied."""
# Tokens of a document in the estimate of a block's work: attention's share hardly changes which blocks go where.
_DOCUMENT_TOKENS = 2048


class Absent(nn.Module):
    """Stands for a module of another stage; the stream goes by."""

    def forward(self, x: Any, *args: Any) -> Any:
        """x."""
        return x


def plan_stages(config: ModelConfig, count: int) -> list[range]:
    """The blocks of each of `count` stages, at least one: the largest work of a stage is as small as it can be.

    Work is what the matrix products and attention of a forward pass take. The head counts with the last stage, by its
    product with every token. The embedding is a lookup and counts nothing. Among equal plans the earlier stages get
    fewer blocks, because they hold the activations of more micro-batches.
    Raises: ParallelError when there are fewer blocks than stages.
    """
    layers = config.num_hidden_layers
    if count > layers:
        raise ParallelError(
            f"the model's {layers} blocks can't be divided into {count} stages: set parallel.pipeline to at most "
            f"{layers}"
        )
    blocks = [block_forward_flops(config, layer, _DOCUMENT_TOKENS) for layer in range(layers)]
    return _balanced(blocks, head_flops(config, _DOCUMENT_TOKENS), count)


def _balanced(blocks: list[int], last: int, count: int) -> list[range]:
    """Stages with the least (largest work, sum of squares); best[i] is the best plan of the first i blocks."""
    layers = len(blocks)
    best: dict[int, tuple[int, int, list[range]]] = {0: (0, 0, [])}
    for stage in range(count):
        is_last = stage == count - 1
        stops = [layers] if is_last else range(stage + 1, layers - (count - stage - 1) + 1)
        plans = {}
        for stop in stops:
            options = []
            for start, (largest, squares, plan) in best.items():
                if start < stop:
                    work = sum(blocks[start:stop]) + (last if is_last else 0)
                    options.append((max(largest, work), squares + work**2, [*plan, range(start, stop)]))
            plans[stop] = min(options, key=lambda option: (option[0], option[1], [len(part) for part in option[2]]))
        best = plans
    return best[layers][2]


def cut_decoder(decoder: Decoder, mesh: Mesh) -> range:
    """Keep this process's stage, in place, also on the meta device, with or without a method. Returns its blocks.

    Nothing happens to a decoder that is cut already. Recordings (CUDA graphs) are off.
    Raises: ParallelError when there are fewer blocks than stages.
    """
    own = plan_stages(decoder.config, mesh.size("pp"))[mesh.index("pp")]
    if decoder.compute_dtype is None and isinstance(decoder.embedding, nn.Embedding):
        decoder.compute_dtype = decoder.embedding.weight.dtype
    is_first, is_last = own.start == 0, own.stop == decoder.config.num_hidden_layers
    for layer in range(decoder.config.num_hidden_layers):
        if layer not in own:
            decoder.blocks[layer] = Absent()
    decoder.captured = None
    if not is_first:
        decoder.positions = None
        if not (is_last and decoder.config.tie_word_embeddings):
            decoder.embedding = cast(nn.Embedding, Absent())
    if not is_last:
        decoder.norm = Absent()
        if decoder.head is not None:
            decoder.head = cast(Any, Absent())
    return own


def holds_two_copies(decoder: Decoder, mesh: Mesh) -> bool:
    """Whether the embedding is also the head, held and trained by the first and the last stage."""
    if not decoder.config.tie_word_embeddings or mesh.size("pp") == 1:
        return False
    is_end = mesh.index("pp") in (0, mesh.size("pp") - 1)
    return is_end and decoder.embedding.weight.requires_grad


def own_blocks(decoder: Decoder) -> list[int]:
    """The numbers of the blocks that are here."""
    return [layer for layer, block in enumerate(decoder.blocks) if isinstance(block, Block)]
