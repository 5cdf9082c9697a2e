"""A module trained by DeepSpeed's ZeRO, with our losses, our data order, our learning rates and our finite checks.

The gradient is that of (sum of losses over all batches of all processes) / (items of all): DeepSpeed averages over
processes, so losses go in times their number, and its division by gradient_accumulation_steps is left out. DeepSpeed
clips, updates, and looks for NaN before it does: the norm that decides is one number, the same on every process.

Under ZeRO-3 a weight is whole only during the forward and backward pass of the module that holds it, so everything that
reads weights runs inside one forward pass: `ZeroEngine.loss`. A decoder's block is gathered as one.
Source: arXiv 1910.02054 (ZeRO), 2101.06840 (offload), 2104.07857 (NVMe); DeepSpeed's documentation.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from tunesmith.errors import ParallelError, RecipeError, TunesmithError
from tunesmith.model.block import Block
from tunesmith.model.lora import AdaptedLinear
from tunesmith.model.quant import NF4Linear
from tunesmith.parallel.deepspeed_config import ZeroConfig
from tunesmith.parallel.deepspeed_install import NVME, nvme_lacks, nvme_mend, require_deepspeed
from tunesmith.parallel.deepspeed_process import forget_process_group, number_alike
from tunesmith.parallel.deepspeed_state import Fragment, ZeroState
from tunesmith.parallel.mesh import Mesh

Batch = TypeVar("Batch")
Loss = Callable[[nn.Module, Batch], tuple[Tensor, int]]
_PERSISTENCE = "stage3_param_persistence_threshold"


@dataclass(frozen=True)
class ZeroStep:
    """What one step did. losses: of this process's batches; loss_sum: of all processes'; count: items of all.

    is_finite: false where a gradient anywhere was NaN or Inf; nothing was updated then.
    """

    losses: tuple[float, ...]
    loss_sum: float
    count: int
    grad_norm: float
    is_finite: bool


class _Called(nn.Module):
    """A module whose forward pass is any function of it: DeepSpeed watches forward passes, and losses are functions."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, function: Any, batch: Any) -> Any:
        return function(self.inner, batch)


class ZeroEngine:
    """DeepSpeed's engine around `module`, whose parameters are DeepSpeed's from here on."""

    def __init__(
        self,
        module: nn.Module,
        config: ZeroConfig,
        groups: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any],
        mesh: Mesh,
    ) -> None:
        """Hand `module` over.

        Args: groups: the optimiser's parameter groups, of what is trained. options: its arguments: lr, and for AdamW
        betas and eps. mesh: data-parallel only.
        Raises: MissingExtraError; RecipeError or ParallelError with what DeepSpeed objects to.
        """
        if not groups:
            raise RecipeError("nothing is trained: every parameter is frozen; choose another method.kind")
        self.module, self.config, self.mesh = module, config, mesh
        self.device, self.world_size = mesh.device, mesh.world_size
        self._library = require_deepspeed(mesh.device.type)
        _require_operators(config, mesh.device)
        forget_process_group()  # an earlier run of this program may have left with its own
        self._owns_group = _join_alone(mesh)
        if config.stage == 3:
            number_alike(mesh.device)
        values = _prepared(module, config)
        optimizer = _own_optimizer(config, groups, options)
        with _objections(config):
            self._engine: Any = self._library.initialize(
                model=_Called(module),
                optimizer=optimizer,
                model_parameters=None if optimizer is not None else [dict(group) for group in groups],
                config=values,
            )[0]
        self.gather_persistent()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimiser that DeepSpeed drives: it sees flat shares of the weights."""
        return cast(torch.optim.Optimizer, self._engine.basic_optimizer)

    @property
    def loss_scale(self) -> float | None:
        """What float16 losses are multiplied by; None for other dtypes."""
        return float(self._engine.optimizer.loss_scale) if self._engine.fp16_enabled() else None

    def set_loss_scale(self, scale: float) -> None:
        """Go on with a loss scale (float16)."""
        self._engine.optimizer.loss_scale = scale

    @property
    def is_sharding_weights(self) -> bool:
        """Whether a weight is whole only where it is used (ZeRO-3)."""
        return self.config.stage == 3

    def loss(self, function: Loss[Batch], batch: Batch) -> tuple[Tensor, int]:
        """function(module, batch) with every weight where it is needed: for training and, under no_grad, evaluation.

        function: gives the sum of the losses and the items it is over. All processes must call it equally often.
        """
        self.gather_persistent()
        return cast(tuple[Tensor, int], self._engine(function, batch))

    def total(self, value: Tensor) -> Tensor:
        """The sum of a value over the processes."""
        summed = value.detach().clone()
        torch.distributed.all_reduce(summed)
        return summed

    def count(self, items: int) -> int:
        """The sum of a number over the processes."""
        return int(self.total(torch.tensor(items, device=self.device)))

    @property
    def num_data(self) -> int:
        """Processes that see other data: all."""
        return self.world_size

    def step(
        self,
        window: Sequence[Batch],
        function: Loss[Batch],
        rate: float,
        denominator: int | None,
        before_update: Callable[[], None] | None = None,
    ) -> ZeroStep:
        """Accumulate over `window`, then update with the learning rate `rate`.

        Args: window: this process's batches, as many on every process. denominator: items counted in the windows of
        all processes; None: found on the way, and the gradients divided at the end. before_update: called when the
        gradients are there.
        """
        self._set_rate(rate)
        losses, counts = [], []
        for place, batch in enumerate(window, start=1):
            self._engine.set_gradient_accumulation_boundary(place == len(window))
            loss_sum, count = self.loss(function, batch)
            self._engine.backward(loss_sum * (self.world_size / (denominator or 1)), scale_wrt_gas=False)
            losses.append(loss_sum.detach().double())
            counts.append(count)
        values = torch.stack(losses).tolist()
        sums = self.total(torch.tensor([sum(values), sum(counts)], dtype=torch.float64, device=self.device)).tolist()
        items = int(sums[1]) if denominator is None else denominator
        if before_update is not None:
            before_update()
        with self._divided_by(items if denominator is None else 1):
            self._engine.step()
        norm = self._engine.get_global_grad_norm()
        is_finite = not bool(self._engine.optimizer.overflow)
        return ZeroStep(tuple(values), sums[0], items, math.inf if norm is None else float(norm), is_finite)

    def gathered(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
        """Within this context these parameters are whole on every process; all must enter it. Reading only."""
        if not self.is_sharding_weights:
            return nullcontext()
        return cast(AbstractContextManager[Any], self._library.zero.GatheredParameters(list(parameters)))

    def gather_persistent(self) -> None:
        """Make whole what stays whole under ZeRO-3, small weights and adapters: in its first step DeepSpeed lets them
        go after each use."""
        kept = getattr(self._engine.optimizer, "persistent_parameters", None) or ()
        missing = [parameter for parameter in kept if parameter.ds_status.name == "NOT_AVAILABLE"]
        if missing:
            missing[0].all_gather(missing)

    def state(self) -> ZeroState:
        """The trained parameters' state, to be saved or restored. Raises: CheckpointError for a foreign optimiser."""
        trained = {name: parameter for name, parameter in self.module.named_parameters() if parameter.requires_grad}
        return ZeroState(self._engine, trained, self.config.stage, self.mesh.rank)

    def restored(self, state: ZeroState, fragments: Sequence[Fragment]) -> None:
        """Go on with what was written into `fragments`, which `state` gave. All processes must call it."""
        state.adopt(fragments)
        self.gather_persistent()

    def close(self) -> None:
        """Let DeepSpeed's buffers and hooks go; the process group too, if it was made here."""
        self._engine.destroy()
        forget_process_group()
        if self._owns_group:
            torch.distributed.destroy_process_group()

    def _set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    @contextmanager
    def _divided_by(self, divisor: int) -> Iterator[None]:
        """DeepSpeed divides gradients by its loss scale before it clips: by the count of items, too."""
        if divisor == 1:
            yield
            return
        if self.loss_scale is not None:
            raise RecipeError(
                "train.precision float16 adapts its loss scale, which the number of items can't be part of: set "
                "train.precision to bfloat16 or float32"
            )
        zero = self._engine.optimizer
        before = zero.loss_scale
        zero.loss_scale = before * max(divisor, 1)
        try:
            yield
        finally:
            zero.loss_scale = before


def _own_optimizer(
    config: ZeroConfig, groups: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
) -> torch.optim.Optimizer | None:
    if config.own_optimizer is None:
        return None
    make = torch.optim.SGD if config.own_optimizer == "sgd" else torch.optim.AdamW
    return make([dict(group) for group in groups], fused=True, **options)


def _prepared(module: nn.Module, config: ZeroConfig) -> dict[str, Any]:
    """DeepSpeed's configuration for this module, which is made ready for ZeRO-3."""
    zero = dict(config.values["zero_optimization"])
    zero.setdefault("memory_efficient_linear", False)  # it would replace torch's linear in the whole process
    if config.stage == 3:
        hold_codes_as_parameters(module)
        _gather_blocks_as_one(module)
        zero[_PERSISTENCE] = _persistence(module, zero.get(_PERSISTENCE))
    return {**config.values, "zero_optimization": zero}


def hold_codes_as_parameters(module: nn.Module) -> None:
    """Make the bytes of NF4 weights frozen parameters: ZeRO-3 shards parameters, and leaves buffers whole.

    Float32 scales stay buffers, since DeepSpeed would cast parameters to bfloat16: 1/64 of the values where they are
    not doubly quantised, 1/16384 where they are. fp8 codes stay whole, too: gloo and older NCCL can't move them.
    """
    for child in module.modules():
        if not isinstance(child, NF4Linear):
            continue
        for name, buffer in list(child.named_buffers(recurse=False)):
            if buffer.dtype is torch.uint8:
                delattr(child, name)
                child.register_parameter(name, nn.Parameter(buffer, requires_grad=False))


def _gather_blocks_as_one(module: nn.Module) -> None:
    """A block's written-out form reads the weights of all its linears in the block's own forward pass.

    DeepSpeed lets a block's weights go when the gradient of its input is there, so every input must have one: below a
    frozen embedding the first block's would not.
    """
    from deepspeed.utils import set_z3_leaf_module

    blocks = [child for child in module.modules() if isinstance(child, Block)]
    for block in blocks:
        set_z3_leaf_module(block, True)
    for block in blocks[:1]:
        block.register_forward_pre_hook(_want_input_grad)


def _want_input_grad(block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    hidden, *others = inputs
    if torch.is_grad_enabled() and not hidden.requires_grad:
        hidden = hidden.detach().requires_grad_()
    return hidden, *others


def _persistence(module: nn.Module, given: int | None) -> int:
    """Up to how many values a weight stays whole on every process: an adapter's always, as it is read for all blocks
    before the first one runs."""
    adapters = [
        p.numel() for child in module.modules() if isinstance(child, AdaptedLinear) for p in child.adapters.parameters()
    ]
    return max([100_000 if given is None else int(given), *adapters])


def _join_alone(mesh: Mesh) -> bool:
    """A group of one process, which DeepSpeed needs; whether it was made."""
    os.environ.setdefault("LOCAL_RANK", str(mesh.place.local_rank))
    if torch.distributed.is_initialized():
        return False
    backend = "cpu:gloo,cuda:nccl" if mesh.device.type == "cuda" else "gloo"
    store: Any = vars(torch.distributed)["HashStore"]()
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    return True


def _require_operators(config: ZeroConfig, device: torch.device) -> None:
    lacks = nvme_lacks(device.type == "cuda") if config.uses_nvme else []
    if lacks:
        raise ParallelError(f"{NVME}, lacks {', '.join(lacks)}: {nvme_mend(lacks)}; or set parallel.offload to cpu")
    if config.offload_device("param") == "nvme" and not _keeps_dtype_on_nvme(config):
        raise ParallelError(
            "DeepSpeed keeps weights on NVMe in bfloat16 on this device, whatever train.precision says: set it to "
            "bfloat16, or offload_param to cpu in a ds_config.json (offload_optimizer may stay on nvme)"
        )


def _keeps_dtype_on_nvme(config: ZeroConfig) -> bool:
    """Whether weights lie on the disk in the dtype of training: DeepSpeed (0.19) asks for float16 only where that can
    be computed with, and takes bfloat16 for anything else where it can't be."""
    from deepspeed.accelerator import get_accelerator

    is_bfloat16 = bool((config.values.get("bf16") or {}).get("enabled"))
    return is_bfloat16 or bool(get_accelerator().is_fp16_supported())


@contextmanager
def _objections(config: ZeroConfig) -> Iterator[None]:
    """What DeepSpeed's checks say, as one line."""
    try:
        yield
    except TunesmithError:
        raise
    except ValueError as error:
        where = "the recipe" if config.source is None else str(config.source)
        raise RecipeError(
            f"DeepSpeed refuses its configuration, from {where}: {' '.join(str(error).split())}"
        ) from error
    except (AssertionError, ImportError, OSError) as error:
        raise ParallelError(f"DeepSpeed can't start: {' '.join(str(error).split())}") from error
