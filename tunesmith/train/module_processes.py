"""Any module in several processes: what can't be done is refused, all begin alike, and every process saves its part.

batches of a step    0  1  2  3  4        the same list in every process
process 0            0     2     4
process 1               1     3     4'    goes through the module too, and counts nothing
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from tunesmith.checkpoint.shards import Shard, whole
from tunesmith.errors import ParallelError, RecipeError
from tunesmith.parallel.agreement import check_agreement, versions
from tunesmith.parallel.data import first_row
from tunesmith.parallel.mesh import Mesh
from tunesmith.parallel.spread import Piece
from tunesmith.recipe.parallel import ParallelSection
from tunesmith.recipe.schema import TrainSection
from tunesmith.train.update import Batch, LossFunction
from tunesmith.train.windows import Filler


def data_parallel(parallel: ParallelSection) -> ParallelSection:
    """Settings for any module: `auto` is ddp, or zero3 where shards wait on the host.

    Raises: ParallelError for what cuts a decoder, and no other module.
    """
    if parallel.engine != "native":
        raise ParallelError(
            "fit trains with parallel.engine native: set that, or give the module to DeepSpeedUpdater, as "
            "examples/digits_deepspeed.py does"
        )
    if parallel.tensor * parallel.pipeline > 1:
        raise ParallelError(
            f"parallel.tensor {parallel.tensor} and parallel.pipeline {parallel.pipeline} cut language models only: "
            f"set both to 1; any module is trained data-parallel"
        )
    if parallel.strategy != "auto":
        return parallel
    return parallel.model_copy(update={"strategy": "zero3" if parallel.offload == "cpu" else "ddp"})


def require_shapes(module: nn.Module) -> None:
    """Raises: RecipeError for a module without parameters, or whose parameters have no shape yet."""
    parameters = dict(module.named_parameters())
    if not parameters:
        raise RecipeError("nothing can be trained: the module has no parameters")
    for name, parameter in parameters.items():
        if isinstance(parameter, UninitializedParameter):
            raise RecipeError(
                f"{name} has no shape yet: it is a lazy module's, which takes it from its first batch; call the module "
                "on a batch before fit()"
            )


def check_module(module: nn.Module, settings: TrainSection, mesh: Mesh) -> None:
    """Raises: ParallelError, RecipeError for what would not be the run of one process."""
    if mesh.world_size == 1:
        return
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise RecipeError("nothing is trained: every parameter is frozen; set requires_grad_(True) on some")
    if settings.optimizer_in_backward:
        raise RecipeError(
            "train.optimizer_in_backward frees gradients before the processes could sum them: set it to false, and use "
            "parallel.strategy zero3 to save memory"
        )
    for name, child in module.named_modules():
        norm = nn.modules.batchnorm._BatchNorm
        if isinstance(child, norm) and child.track_running_stats and not isinstance(child, nn.SyncBatchNorm):
            raise ParallelError(
                f"{name or 'the module'} is a {type(child).__name__}, whose running statistics would be of each "
                f"process's own batches: use GroupNorm or LayerNorm, on GPUs torch.nn.SyncBatchNorm, or one process"
            )


def begin_alike(module: nn.Module, mesh: Mesh, facts: dict[str, Any]) -> None:
    """All processes are asked the same, and get the first one's weights. Raises: ParallelError naming what differs."""
    if mesh.world_size == 1:
        return
    tensors = module.state_dict(keep_vars=True)
    shapes = {name: [list(tensor.shape), str(tensor.dtype)] for name, tensor in tensors.items()}
    check_agreement({"versions": versions(mesh.device.type), **facts, "module": shapes})
    for tensor in (*module.parameters(), *module.buffers()):
        _take_first_ones(tensor.detach())


def _take_first_ones(tensor: Tensor) -> None:
    """Put the first process's values in. As bytes, since groups don't know every dtype (masks of bool), and in a row:
    of a tensor that is laid out otherwise they would send its memory, or what lies behind it."""
    if tensor.numel() == 0:
        return
    once = tensor[tuple(slice(1) if stride == 0 else slice(None) for stride in tensor.stride())]
    whole = once.clone(memory_format=torch.contiguous_format)
    torch.distributed.broadcast(whole.view(-1).view(torch.uint8), src=0)
    once.copy_(whole)


def without_fillers(loss: LossFunction[Batch]) -> LossFunction[Batch | Filler[Batch]]:
    """`loss`, to which a filler is 0 over no items; its gradients are zeros."""

    def of_any(module: nn.Module, batch: Batch | Filler[Batch]) -> tuple[Tensor, int]:
        if isinstance(batch, Filler):
            return loss(module, batch.batch)[0] * 0, 0
        return loss(module, batch)

    return of_any


def through_forward(loss: LossFunction[Batch]) -> LossFunction[Batch]:
    """`loss`, of a module whose weights are gathered when it is called: said clearly where it is not called."""

    def checked(module: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        called: list[bool] = []
        with_hook = module.register_forward_pre_hook(lambda *_: called.append(True), prepend=True)
        try:
            return loss(module, batch)
        except (RuntimeError, TypeError) as error:
            if called:
                raise
            raise ParallelError(
                f"the loss reads weights of {type(module).__name__} without calling it, and each process holds a share "
                f"of them: call module(...), or set parallel.strategy ddp"
            ) from error
        finally:
            with_hook.remove()

    return checked


def rest_of(module: nn.Module, pieces: Sequence[Piece], mesh: Mesh) -> list[Shard]:
    """What a state holds of a module besides its trained parameters: frozen ones and buffers, as they are held here."""
    trained = {piece.name for piece in pieces} | {name for name, p in _all_parameters(module) if p.requires_grad}
    tensors: dict[str, Tensor] = {k: v for k, v in module.state_dict(keep_vars=True).items() if k not in trained}
    return [_shard(f"model.{name}", tensor.detach(), mesh) for name, tensor in tensors.items()]


def with_aliases(shards: Sequence[Shard], module: nn.Module) -> list[Shard]:
    """`shards`, those of a parameter that has several names under each: as one process saves them."""
    first: dict[nn.Parameter, str] = {}
    aliases: dict[str, list[str]] = {}
    for name, parameter in _all_parameters(module):
        if first.setdefault(parameter, name) != name:
            aliases.setdefault(f"model.{first[parameter]}", []).append(f"model.{name}")
    return [*shards, *(replace(s, name=name) for s in shards for name in aliases.get(s.name, []))]


def check_buffers(module: nn.Module, mesh: Mesh) -> None:
    """Raises: ParallelError in all processes where they hold other values in a buffer: a state has one of each."""
    kept = module.state_dict(keep_vars=True).keys()
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in kept}
    if mesh.world_size > 1 and buffers:
        check_agreement({"buffers": {name: _digest(buffer) for name, buffer in buffers.items()}})


def _all_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return module.named_parameters(remove_duplicate=False)


def _shard(name: str, tensor: Tensor, mesh: Mesh) -> Shard:
    if not hasattr(tensor, "to_local"):
        return whole(name, tensor)
    local, shape = cast(Any, tensor).to_local(), tuple(tensor.shape)
    start = first_row(shape[0], mesh.size("dp"), mesh.index("dp"))
    return Shard(name, local, shape, ((start, start + local.shape[0]), *((0, size) for size in shape[1:])))


def _digest(tensor: Tensor) -> str:
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]
