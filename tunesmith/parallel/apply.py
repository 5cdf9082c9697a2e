"""A recipe's strategy put into place: from settings and a model to a `Spread`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import nn

from tunesmith.errors import ParallelError
from tunesmith.model.decoder import Decoder
from tunesmith.model.lora import AdaptedLinear
from tunesmith.parallel.data import Replicated, Sharded, first_row
from tunesmith.parallel.full_shard import FullShard, Precision
from tunesmith.parallel.mesh import Mesh
from tunesmith.parallel.pipeline import Piped
from tunesmith.parallel.spread import Alone, Spread
from tunesmith.parallel.tensor_spread import Shared, around
from tunesmith.recipe.parallel import ParallelSection

Resolved = Literal["ddp", "zero1", "zero2", "zero3"]


def resolve_strategy(settings: ParallelSection, *, has_adapters: bool) -> Resolved:
    """The strategy with auto decided: adapters are small, so that a base which fits is best held by every process.

    With a pipeline weights stay where they are: gathered again for every micro-batch, they would be read all the time.
    """
    if settings.strategy != "auto":
        return settings.strategy
    if settings.pipeline > 1:
        return "ddp" if has_adapters else "zero1"
    if settings.offload == "cpu":
        return "zero3"
    return "ddp" if has_adapters else "zero3"


def spread_out(
    module: nn.Module, mesh: Mesh, settings: ParallelSection, compute_dtype: torch.dtype | None = None
) -> Spread:
    """Apply `settings` to a module whose weights are in place, on every process alike. Tensors are cut already.

    Args: compute_dtype: what sharded float32 weights are gathered in; None: as they are held.
    Raises: ParallelError.
    """
    if mesh.size("pp") > 1:
        return _piped(module, mesh, settings)
    return around(_spread_data(module, mesh, settings, compute_dtype), module)


def _spread_data(module: nn.Module, mesh: Mesh, settings: ParallelSection, compute_dtype: torch.dtype | None) -> Spread:
    """Over the data-parallel processes."""
    if mesh.size("dp") == 1:
        return Alone(module)
    adapters = [
        p for child in module.modules() if isinstance(child, AdaptedLinear) for p in child.adapters.parameters()
    ]
    cut = full_shard(mesh, settings, compute_dtype, has_adapters=bool(adapters))
    if cut is None:
        return Replicated(module, mesh, finds_unused=_may_leave_unused(module))
    blocks = blocks_of(module)
    _refuse_what_can_not_shard(module, blocks)
    _refuse_empty_shares(module, mesh, adapters)
    return Sharded(module, cut, blocks=blocks, replicated=adapters)


def full_shard(
    mesh: Mesh, settings: ParallelSection, compute_dtype: torch.dtype | None, *, has_adapters: bool
) -> FullShard | None:
    """How data-parallel processes share weights, which a block may be subject to before the next is loaded; None where
    each of them holds all. Args: compute_dtype: see `spread_out`. Raises: ParallelError."""
    kind = resolve_strategy(settings, has_adapters=has_adapters)
    if mesh.size("dp") == 1 or kind == "ddp":
        return None
    if settings.offload == "cpu" and mesh.device.type != "cuda":
        raise ParallelError(
            f"parallel.offload cpu moves shares from a GPU to the host, and the device is {mesh.device}: set it to none"
        )
    precision = Precision(None if has_adapters else compute_dtype)
    return FullShard(mesh, kind, precision, offloads=settings.offload == "cpu")


def _piped(module: nn.Module, mesh: Mesh, settings: ParallelSection) -> Piped:
    """The stage of a pipeline, tensor and data parallelism within it."""
    if not isinstance(module, Decoder):
        raise ParallelError(
            f"parallel.pipeline cuts the native decoder, and this is a {type(module).__name__}: set it to 1"
        )
    if settings.offload != "none":
        raise ParallelError(f"parallel.offload {settings.offload} does not go with parallel.pipeline: set it to none")
    has_adapters = any(isinstance(child, AdaptedLinear) for child in module.modules())
    kind = resolve_strategy(settings, has_adapters=has_adapters)
    return Piped(module, mesh, shares_states=kind == "zero1")


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """What is sharded block by block: a decoder's blocks, else the longest list of modules; of others nothing."""
    if isinstance(module, Decoder):
        return list(module.blocks)
    lists = [child for child in module.modules() if isinstance(child, nn.ModuleList)]
    return sorted((list(found) for found in lists), key=len)[-1] if lists else []


def strategy_of(spread: Spread) -> str:
    """What a spread is, for the run directory: how data-parallel processes share."""
    if isinstance(spread, Shared):
        return strategy_of(spread.inner)
    if isinstance(spread, Sharded | Piped):
        return spread.kind
    return "ddp" if isinstance(spread, Replicated) else "none"


def needs_launches(spread: Spread) -> bool:
    """Whether blocks must be called one by one, because hooks gather their weights, and can't be recorded."""
    return not isinstance(spread, Alone)


def _may_leave_unused(module: nn.Module) -> bool:
    """Whether a pass may not reach every trained parameter: experts that no token chose."""
    config: Any = getattr(module, "config", None)
    return isinstance(module, Decoder) and cast(Any, config).moe is not None


def _refuse_what_can_not_shard(module: nn.Module, blocks: Sequence[nn.Module]) -> None:
    paths = [f"{path}." for path, child in module.named_modules(remove_duplicate=False) if child in blocks]
    homes: dict[nn.Parameter, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter.ndim == 0:
            raise ParallelError(f"{name} has no dimension, so it can't be sharded: use parallel.strategy ddp")
        if not parameter.is_contiguous() and not hasattr(parameter, "to_local"):
            raise ParallelError(
                f"{name} is not contiguous (a transposed weight, or channels last), so it can't be sharded: use "
                f"parallel.strategy ddp"
            )
        home = next((path for path in paths if name.startswith(path)), "")
        if homes.setdefault(parameter, home) != home:
            raise ParallelError(
                f"{name} is a parameter of {homes[parameter] or 'the rest.'}* too, and each block's are gathered by "
                f"themselves: use parallel.strategy ddp"
            )


def _refuse_empty_shares(module: nn.Module, mesh: Mesh, replicated: Sequence[nn.Parameter]) -> None:
    """Parameters are cut by rows, and a process without any would have nothing to train."""
    if any(parameter.requires_grad for parameter in replicated):
        return
    processes = mesh.size("dp")
    rows = max((len(parameter) for parameter in module.parameters() if parameter.requires_grad), default=0)
    if rows and first_row(rows, processes, processes - 1) >= rows:
        raise ParallelError(
            f"what is trained has at most {rows} rows, of which {processes} processes would not have one each: use "
            f"parallel.strategy ddp, or fewer processes"
        )
