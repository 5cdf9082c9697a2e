"""Tensor parallelism with sequence parallelism: processes share each matrix of the blocks, and the tokens between them.

    stream [T/n, D] -> norm -> all-gather -> [T, D] qkv by rows, a process's heads, output by columns -> [T, D] partial
                    -> reduce-scatter -> [T/n, D] + stream; the MLP alike

Embedding, norms and head are whole in every process and see its tokens, or its heads, only: their gradients are partial
and must be summed (`sum_partial_gradients`). The gradients of shards are whole as they are.
Sources: arXiv 1909.08053, section 3; arXiv 2205.05198, section 4.2.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from tunesmith.arch import ModelConfig
from tunesmith.errors import ParallelError
from tunesmith.model.block import Attention, Block, Mlp
from tunesmith.model.decoder import Decoder
from tunesmith.model.lora import AdaptedLinear
from tunesmith.model.moe import Experts
from tunesmith.model.packed import PackedTokens, packed
from tunesmith.parallel.collectives import Team, gather_rows, scatter_sum
from tunesmith.parallel.mesh import Mesh
from tunesmith.parallel.placement import Placement, Shard, whole_placement
from tunesmith.parallel.shard_linears import shard_adapters, shard_linear

# Gradients from this size on are summed where they are; smaller ones share a message.
_ALONE = 2**20


@dataclass
class SharedStream:
    """The stream of a team, and how its linears are cut: path of the linear -> shard."""

    team: Team
    shards: dict[str, Shard] = field(default_factory=dict)
    adapted: set[str] = field(default_factory=set)
    """Paths of linears whose adapters are cut."""
    idle: set[str] = field(default_factory=set)
    """Trained biases that another process holds."""

    def padded(self, pack: PackedTokens) -> PackedTokens:
        """With an untrained document at the end where the tokens can't be divided evenly."""
        missing = -pack.tokens_T.numel() % self.team.size
        if not missing:
            return pack
        filler = pack.tokens_T.new_zeros(missing)
        return packed(torch.cat((pack.tokens_T, filler)), (*pack.lengths, missing))

    def own(self, x_TD: Tensor) -> Tensor:
        """The rows of this process's tokens."""
        return self.team.own(x_TD)

    def gathered(self, x_PD: Tensor) -> Tensor:
        """See `collectives.gather_rows`."""
        return gather_rows(x_PD, self.team)

    def summed(self, x_TD: Tensor) -> Tensor:
        """See `collectives.scatter_sum`."""
        return scatter_sum(x_TD, self.team)

    def gather(self, x_PD: Tensor) -> Tensor:
        """See `Team.gather`."""
        return self.team.gather(x_PD)

    def scatter(self, x_TD: Tensor) -> Tensor:
        """See `Team.scatter_sum`."""
        return self.team.scatter_sum(x_TD)

    def gather_beside(self, x_PD: Tensor) -> Callable[[], Tensor]:
        """See `Team.gather_beside`."""
        return self.team.gather_beside(x_PD)

    def scatter_beside(self, x_TD: Tensor) -> Callable[[], Tensor]:
        """See `Team.scatter_sum_beside`."""
        return self.team.scatter_sum_beside(x_TD)


def shard_tensors(decoder: Decoder, mesh: Mesh) -> None:
    """Keep this process's part of every linear of the blocks, in place, and let the blocks exchange tokens.

    Called with the method applied and before the optimiser is made; what is whole is the same in all processes of
    mesh.group("tp"). A decoder that was loaded in parts (`share_linears`) gets its adapters cut. Blocks are not
    recorded as CUDA graphs. Nothing happens where the mesh has one such process.
    Raises: ParallelError where heads or matrices can't be divided, or the adapters have dropout.
    """
    if mesh.size("tp") == 1:
        return
    stream = decoder.stream if isinstance(decoder.stream, SharedStream) else share_linears(decoder, mesh)
    _refuse_dropout(decoder)
    idle = set()
    for path, linear, kind in _block_linears(decoder):
        module, shard = cast(Any, linear), stream.shards[path]
        if isinstance(linear, AdaptedLinear):
            if path not in stream.adapted:
                shard_adapters(linear, shard, stream.team)
                stream.adapted.add(path)
        elif kind == "columns" and shard.index and module.bias is not None and module.bias.requires_grad:
            module.bias.requires_grad_(False)
            idle.add(f"{path}.bias")
    stream.idle |= idle
    if decoder.captured is not None:
        decoder.captured.give_up("the blocks talk to other processes, which share their matrices (parallel.tensor)")


def share_linears(decoder: Decoder, mesh: Mesh) -> SharedStream:
    """`shard_tensors` before a method is applied, also on the meta device: linears without their adapters."""
    count = mesh.size("tp")
    check_shareable(decoder, count)
    stream = SharedStream(Team(mesh.group("tp"), count, mesh.index("tp")))
    for path, linear, kind in _block_linears(decoder):
        base = linear.base if isinstance(linear, AdaptedLinear) else linear
        known: Any = base
        shard = Shard(kind, stream.team.index, count, dict(known.parts), int(known.in_features))
        shard_linear(base, shard, stream.team, path)
        stream.shards[path] = shard
    decoder.stream = stream
    for _, block in _blocks(decoder):
        block.stream = stream
        block.attention.num_heads //= count
        block.attention.num_kv_heads //= count
    return stream


def check_shareable(decoder: Decoder, count: int) -> None:
    """Whether `count` processes can share each matrix. Raises: ParallelError naming the numbers that can."""
    config = decoder.config
    sizes = {
        "heads": config.num_attention_heads,
        "key-value heads": config.num_key_value_heads,
        **_mlp_sizes(config),
    }
    bad = [f"{size} {name}" for name, size in sizes.items() if size % count]
    if bad:
        most = math.gcd(*sizes.values())
        allowed = ", ".join(str(n) for n in range(1, most + 1) if most % n == 0)
        raise ParallelError(
            f"parallel.tensor {count} does not divide the model's {' and '.join(bad)}: set it to one of {allowed}"
        )


def _refuse_dropout(decoder: Decoder) -> None:
    if any(child.dropout for child in decoder.modules() if isinstance(child, AdaptedLinear)):
        raise ParallelError(
            "adapters with dropout can't be shared by processes, which would draw other masks than one: set "
            "method.dropout to 0, or parallel.tensor to 1"
        )


def _mlp_sizes(config: ModelConfig) -> dict[str, int]:
    layers = range(config.num_hidden_layers)
    sizes = {}
    if not all(config.is_moe(layer) for layer in layers):
        sizes["features of the MLP"] = config.intermediate_size
    if config.moe is not None and any(config.is_moe(layer) for layer in layers):
        sizes["features of an expert"] = config.moe.intermediate_size
    return sizes


def _block_linears(decoder: Decoder) -> Iterator[tuple[str, nn.Module, Literal["rows", "columns"]]]:
    """Path, linear and how it is cut, of all blocks; routers are not cut."""
    for layer, block in _blocks(decoder):
        path = f"blocks.{layer}"
        attention: Attention = block.attention
        yield f"{path}.attention.qkv", attention.qkv, "rows"
        yield f"{path}.attention.output", attention.output, "columns"
        for inner, mlp in _mlps(block.mlp):
            yield f"{path}.{inner}.up", mlp.up, "rows"
            yield f"{path}.{inner}.down", mlp.down, "columns"


def _blocks(decoder: Decoder) -> Iterator[tuple[int, Block]]:
    """Number and block of those that are here: a stage of a pipeline has some only."""
    return ((layer, block) for layer, block in enumerate(decoder.blocks) if isinstance(block, Block))


def _mlps(mlp: nn.Module) -> Iterator[tuple[str, Mlp]]:
    experts = enumerate(mlp.experts) if isinstance(mlp, Experts) else ()
    for number, expert in experts:
        assert isinstance(expert, Mlp)
        yield f"mlp.experts.{number}", expert
    if isinstance(mlp, Mlp):
        yield "mlp", mlp


def placements(decoder: Decoder) -> dict[str, Placement]:
    """Logical name -> which part this process holds, of every trained parameter; the same names in all processes.

    A process holds no chunk of the bias of a linear that is cut by columns, unless it is the first.
    """
    stream = decoder.stream
    found = {}
    for name, parameter in decoder.named_parameters():
        is_idle = isinstance(stream, SharedStream) and name in stream.idle
        if parameter.requires_grad or is_idle:
            shape = tuple(parameter.shape)
            linear = _linear_of(stream, name)
            if linear is None:
                found[name] = whole_placement(shape)
            else:
                path, shard = linear
                found[name] = shard.placement(name[len(path) + 1 :], shape, is_held=not is_idle)
    return found


def _linear_of(stream: object, name: str) -> tuple[str, Shard] | None:
    if not isinstance(stream, SharedStream):
        return None
    path = name
    while path:
        path = path.rpartition(".")[0]
        if path in stream.shards:
            return path, stream.shards[path]
    return None


def partial_parameters(decoder: Decoder) -> dict[str, nn.Parameter]:
    """The trained parameters that every process of the team holds whole, and whose gradients are each only a part.

    Embedding, norms, head and routers; A of linears cut by rows, B and magnitude of those cut by columns.
    """
    if not isinstance(decoder.stream, SharedStream):
        return {}
    parameters = dict(decoder.named_parameters())
    return {name: parameters[name] for name, placement in placements(decoder).items() if not placement.is_sharded}


def sum_partial_gradients(decoder: Decoder) -> None:
    """Sum the gradients of `partial_parameters` over the team: after the last backward pass of a step (and after
    `Spread.collect`, which `tensor_spread.Shared` sees to).

    The same number everywhere afterwards. A missing gradient counts as zero. Small ones go in one float32 message.
    """
    if isinstance(decoder.stream, SharedStream):
        sum_gradients(list(partial_parameters(decoder).values()), decoder.stream.team)


def sum_gradients(parameters: Sequence[nn.Parameter], team: Team) -> None:
    """Sum the gradients of these over the team; see `sum_partial_gradients`."""
    gradients = [_gradient(parameter) for parameter in parameters]
    small = [gradient for gradient in gradients if gradient.numel() < _ALONE]
    for gradient in gradients:
        if gradient.numel() >= _ALONE:
            team.sum_(gradient)
    if small:
        flat = torch.cat([gradient.reshape(-1).float() for gradient in small])
        team.sum_(flat)
        parts = flat.split([gradient.numel() for gradient in small])
        torch._foreach_copy_(small, [part.view_as(gradient) for part, gradient in zip(parts, small, strict=True)])


def _gradient(parameter: nn.Parameter) -> Tensor:
    """The gradient, contiguous; zeros where there is none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    parameter.grad = parameter.grad.contiguous()
    return parameter.grad


def own_tokens(num_tokens: int, mesh: Mesh) -> range:
    """The tokens of a pack whose hidden states this process gets from `Decoder.hidden`; the last may lie behind it."""
    rows = -(-num_tokens // mesh.size("tp"))
    first = mesh.index("tp") * rows
    return range(first, first + rows)


def own_targets(index: Tensor, targets: Tensor, num_tokens: int, mesh: Mesh) -> tuple[Tensor, Tensor]:
    """The trained positions among `own_tokens`, counted from the first of these, and their targets.

    Every process computes the loss of its own: the sum over the team is that of the pack, and what it is divided by
    stays the number of trained tokens of whole packs.

    Args:
        index, targets: of the whole pack, on the host, index ascending.
        num_tokens: of the whole pack, as it is given to `Decoder.hidden`.
    """
    own = own_tokens(num_tokens, mesh)
    first, last = torch.searchsorted(index, torch.tensor([own.start, own.stop])).tolist()
    return index[first:last] - own.start, targets[first:last]


def whole_tensor(decoder: Decoder, tensor: Tensor, placement: Placement) -> Tensor:
    """What the team holds together of a parameter, or of what belongs to it: its gradient, an optimiser's state.

    All processes of the team call it for the same tensors in the same order; a process that holds nothing gives any
    tensor of that dtype and device.
    """
    stream = decoder.stream
    if not placement.is_sharded or not isinstance(stream, SharedStream):
        return tensor
    whole = tensor.new_zeros(placement.shape)
    for chunk in placement.chunks:
        whole[_index(chunk.whole)] = tensor.detach()[_index(chunk.local)]
    stream.team.sum_(whole)
    return whole


def _index(box: tuple[tuple[int, int], ...]) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in box)
