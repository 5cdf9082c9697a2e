"""Model states of one process of a spread run, by formula: weights, gradients and optimiser states.

With P parameters, bytes w of a weight, g of a gradient and s of the optimiser's states for each, and n data-parallel
processes (arXiv 1910.02054, section 5, where w = g = 2 and s = 12):

    ddp     (w + g + s) P           zero2   w P + (g + s) P / n
    zero1   (w + g) P + s P / n     zero3   (w + g + s) P / n

`zero_bytes` is that, which DeepSpeed holds: a working copy beside the float32 masters. FSDP2 has no working copy: with
every strategy it holds the masters' shard, (w + g + s) P / n, and what is whole during a pass lies beside it, gathered
in the compute dtype: everything (zero1, zero2) or a block at a time (zero3). `rank_states` is that, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tunesmith.arch import ModelConfig
from tunesmith.cost.memory import DTypeName, Optimizer, OwnerBytes, is_quantised, optimizer_bytes
from tunesmith.cost.params import TrainedParts, block_norm_parameters, norm_parameters, trained_parts
from tunesmith.cost.shapes import LinearShape, Method, block_linears
from tunesmith.formats import FORMATS
from tunesmith.units import ceil_div

Strategy = Literal["ddp", "zero1", "zero2", "zero3"]
Cut = Literal["rows", "columns", "none"]
_COLUMN_PARTS = frozenset({"o_proj", "c_proj", "down_proj"})
_OUTSIDE = -1
"""In place of a block's number: embedding, final norm and head."""
_AT_ONCE = 2
"""Blocks that are whole at a time under zero3: the one at work, and the next, which is being gathered."""


@dataclass(frozen=True)
class Layout:
    """How many processes share what: `data` see other tokens, `tensor` share matrices, `pipeline` share blocks.

    blocks: how many blocks each stage of the pipeline has; none: as even as they come, the first having one more.
    """

    strategy: Strategy = "ddp"
    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    blocks: tuple[int, ...] = ()

    @property
    def world_size(self) -> int:
        """All processes."""
        return self.data * self.tensor * self.pipeline

    @property
    def is_sharded(self) -> bool:
        """Whether data-parallel processes hold shares of the states."""
        return self.strategy != "ddp" and self.data > 1


@dataclass(frozen=True)
class Formats:
    """Number formats. weights: of what is frozen; master: of what is trained; compute: what passes run in."""

    weights: DTypeName = "bfloat16"
    master: DTypeName = "float32"
    compute: DTypeName = "bfloat16"
    optimizer: Optimizer = "adamw"


@dataclass(frozen=True)
class HeldTensor:
    """A parameter as one process of a tensor-parallel group holds it, before it is sharded by rows.

    block: its number, or -1 outside the blocks. frozen_row_bytes: of a quantised row; None: rows are plain values.
    """

    block: int
    rows: int
    columns: int
    is_trained: bool
    is_adapter: bool = False
    frozen_row_bytes: int | None = None
    frozen_bytes: int | None = None
    """Of the whole tensor, where that is not rows times a row's bytes (doubly quantised scales)."""

    @property
    def values(self) -> int:
        """Values of all rows."""
        return self.rows * self.columns

    def share(self, processes: int) -> HeldTensor:
        """What each of `processes` holds: chunks of rows, the ceiling of an even split (shorter ones are padded)."""
        if processes == 1 or self.is_adapter:
            return self
        return replace(self, rows=ceil_div(self.rows, processes), frozen_bytes=None)

    def weight_bytes(self, formats: Formats) -> int:
        """Bytes as held."""
        if self.is_trained:
            return self.values * _width(formats.master)
        if self.frozen_bytes is not None:
            return self.frozen_bytes
        if self.frozen_row_bytes is not None:
            return self.rows * self.frozen_row_bytes
        return self.values * _width(formats.weights)


@dataclass(frozen=True)
class RankStates:
    """Bytes of one process.

    held: at the update, gradients included. gathered: weights that are whole beside their shards, at their most.
    whole_gradients: gradients before they are scattered, at their most.
    """

    held: OwnerBytes
    gathered: int
    whole_gradients: int

    @property
    def most(self) -> int:
        """All states during a backward pass; activations come on top."""
        return self.held.total + self.gathered + self.whole_gradients


def rank_states(
    config: ModelConfig, method: Method, layout: Layout, formats: Formats, *, stage: int | None = None
) -> RankStates:
    """Model states of a process of our own strategies (see the module). stage: of a pipeline; None: the fullest one."""
    if stage is None:
        stages = (rank_states(config, method, layout, formats, stage=i) for i in range(layout.pipeline))
        return max(stages, key=lambda states: states.held.total)
    whole = list(held_tensors(config, method, layout, stage))
    shares = [tensor.share(layout.data if layout.is_sharded else 1) for tensor in whole]
    held = _owner_bytes(shares, formats)
    if not layout.is_sharded:
        return RankStates(held, 0, 0)
    gathered, gradients = _whole_at_once(whole, layout.strategy, formats)
    return RankStates(held, gathered, gradients)


def held_tensors(config: ModelConfig, method: Method, layout: Layout, stage: int = 0) -> Iterator[HeldTensor]:
    """Every parameter of a stage, as a process of a tensor-parallel group holds it."""
    trained = trained_parts(config, method)
    first, last = stage == 0, stage == layout.pipeline - 1
    for layer in stage_blocks(config.num_hidden_layers, layout, stage):
        norms = trained.norms or layer in trained.blocks
        yield HeldTensor(layer, block_norm_parameters(config), 1, norms)
        for linear in block_linears(config, layer):
            yield from _linear_tensors(config, linear, method, layout, layer in trained.blocks)
    yield from _outer_tensors(config, trained, first=first, last=last)


def stage_blocks(num_layers: int, layout: Layout, stage: int) -> range:
    """The blocks of a pipeline's stage."""
    least, more = divmod(num_layers, layout.pipeline)
    counts = layout.blocks or [least + (number < more) for number in range(layout.pipeline)]
    start = sum(counts[:stage])
    return range(start, start + counts[stage])


def _outer_tensors(config: ModelConfig, trained: TrainedParts, *, first: bool, last: bool) -> Iterator[HeldTensor]:
    """Embedding at the first stage, final norm and head at the last; a tied matrix is held at both."""
    tied = config.tie_word_embeddings
    if first or (last and tied):
        yield HeldTensor(_OUTSIDE, config.vocab_size, config.hidden_size, trained.embedding)
    if first and config.learned_positions:
        yield HeldTensor(_OUTSIDE, config.max_position_embeddings, config.hidden_size, trained.embedding)
    if last:
        yield HeldTensor(_OUTSIDE, norm_parameters(config, config.hidden_size), 1, trained.norms)
    if last and not tied:
        yield HeldTensor(_OUTSIDE, config.vocab_size, config.hidden_size, trained.head)


def _linear_tensors(
    config: ModelConfig, linear: LinearShape, method: Method, layout: Layout, is_trained: bool
) -> Iterator[HeldTensor]:
    cut: Cut = "none" if linear.owner == "router" else "columns" if _COLUMN_PARTS & linear.parts.keys() else "rows"
    by_rows, by_columns = (layout.tensor if cut == kind else 1 for kind in ("rows", "columns"))
    columns = linear.in_features // by_columns
    parts = {part: rows // by_rows for part, rows in linear.parts.items()}
    rows = sum(parts.values())
    has_codes = method.kind == "qlora" or method.base == "fp8"
    if has_codes and linear.owner != "router" and is_quantised(linear, config, method):
        yield from _quantised(linear, method, parts, columns, plain=layout.is_sharded or layout.tensor > 1)
    else:
        yield HeldTensor(linear.layer, linear.copies * rows, columns, is_trained)
    if linear.bias:
        yield HeldTensor(linear.layer, linear.copies * rows, 1, is_trained)
    for part in linear.targeted(method):
        size = method.rank * (columns + parts[part]) + (parts[part] if method.dora else 0)
        yield HeldTensor(linear.layer, linear.copies * size, 1, is_trained=True, is_adapter=True)


def _quantised(
    linear: LinearShape, method: Method, parts: dict[str, int], columns: int, *, plain: bool
) -> Iterator[HeldTensor]:
    """The frozen weight of a quantised linear: fp8 with a scale a row, or NF4, each projection by itself."""
    if method.kind != "qlora":
        row = FORMATS["fp8"].bytes_for(columns) + FORMATS["float32"].bytes_for(1)
        yield HeldTensor(linear.layer, linear.copies * sum(parts.values()), columns, False, frozen_row_bytes=row)
        return
    kind = FORMATS["nf4-double" if method.double_quantisation and not plain else "nf4"]
    for rows in parts.values():
        total = linear.copies * kind.bytes_for(rows * columns)
        row = ceil_div(FORMATS["nf4"].bytes_for(rows * columns), rows)
        yield HeldTensor(linear.layer, linear.copies * rows, columns, False, frozen_row_bytes=row, frozen_bytes=total)


def _owner_bytes(tensors: Sequence[HeldTensor], formats: Formats) -> OwnerBytes:
    master = _width(formats.master)
    trained = sum(tensor.values for tensor in tensors if tensor.is_trained)
    return OwnerBytes(
        weights=sum(tensor.weight_bytes(formats) for tensor in tensors if not tensor.is_adapter),
        adapters=sum(tensor.values * master for tensor in tensors if tensor.is_adapter),
        gradients=trained * master,
        optimizer=optimizer_bytes(trained, formats.optimizer, master),
    )


def _whole_at_once(tensors: Sequence[HeldTensor], strategy: Strategy, formats: Formats) -> tuple[int, int]:
    """Bytes of gathered weights and of gradients that are not scattered yet, at their most."""
    weights, gradients = by_block(tensors, formats)
    outside, blocks = weights.pop(_OUTSIDE, 0), sorted(weights.values())
    outer_gradients, block_gradients = gradients.pop(_OUTSIDE, 0), sorted(gradients.values())
    gathered = outside + sum(blocks if strategy != "zero3" else blocks[-_AT_ONCE:])
    waiting = outer_gradients + sum(block_gradients if strategy == "zero1" else block_gradients[-1:])
    return gathered, waiting


def by_block(tensors: Sequence[HeldTensor], formats: Formats) -> tuple[dict[int, int], dict[int, int]]:
    """(bytes gathered, bytes of gradients scattered) by block, -1 being what is outside the blocks.

    Beside adapters a base is gathered as it is held; without any it is cast to the compute dtype before.
    """
    has_adapters = any(tensor.is_adapter for tensor in tensors)
    width = _width(formats.master if has_adapters else formats.compute)
    weights: dict[int, int] = {}
    gradients: dict[int, int] = {}
    for tensor in tensors:
        if tensor.is_adapter:
            continue
        size = tensor.weight_bytes(formats) if has_adapters else tensor.values * _width(formats.compute)
        weights[tensor.block] = weights.get(tensor.block, 0) + size
        if tensor.is_trained:
            gradients[tensor.block] = gradients.get(tensor.block, 0) + tensor.values * width
    return weights, gradients


def zero_bytes(parameters: int, layout: Layout, *, weight: int = 2, gradient: int = 2, states: int = 12) -> OwnerBytes:
    """ZeRO's own formula (see the module): bytes of a process for `parameters` that are all trained.

    Args: weight, gradient: bytes of the working copy; states: of float32 masters and AdamW's two moments.
    Source: arXiv 1910.02054, section 5 and figure 1.
    """
    stage = {"ddp": 0, "zero1": 1, "zero2": 2, "zero3": 3}[layout.strategy]
    share = ceil_div(parameters, layout.data)
    return OwnerBytes(
        weights=weight * (share if stage >= 3 else parameters),
        adapters=0,
        gradients=gradient * (share if stage >= 2 else parameters),
        optimizer=states * (share if stage >= 1 else parameters),
    )


def _width(dtype: DTypeName) -> int:
    return FORMATS[dtype].bytes_for(1)
