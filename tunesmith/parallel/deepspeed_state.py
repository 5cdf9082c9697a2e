"""What DeepSpeed holds of a training state, as boxes of logical tensors: names, shapes and dtypes are the native
engine's, so that a state goes from one engine, or number of processes, to another. No pickle.

DeepSpeed's shares are ranges of flattened tensors. A range of a matrix is at most three boxes: the end of a row, whole
rows, the beginning of one. What waits on a disk (NVMe) is read a sub-group at a time, into files beside DeepSpeed's.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.errors import CheckpointError

Slices = tuple[tuple[int, int], ...]
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, eq=False)
class Fragment:
    """A box of a logical tensor. tensor: its values, which may be written to until `ZeroState.adopt`.

    name: "model.<parameter>" or "optimizer.<parameter>.<state>". Scalars are handed over by every process.
    """

    name: str
    tensor: Tensor
    shape: tuple[int, ...]
    slices: Slices


@dataclass(frozen=True, eq=False)
class _Share:
    """A process's range of a flattened tensor. values: of the range; whole: what goes back to DeepSpeed, padded."""

    parameter: nn.Parameter
    key: str | None
    values: Tensor
    whole: Tensor


def boxes_of(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[Slices, int]]:
    """The boxes that values start to stop of a flattened tensor of this shape are, each with its number of values."""
    if start >= stop:
        return
    if len(shape) <= 1:
        yield ((start, stop),) if shape else (), stop - start
        return
    rows, row = tuple((0, size) for size in shape[1:]), math.prod(shape[1:])
    first, last = start // row, stop // row
    if first == last:
        yield from _within_row(shape, first, start - first * row, stop - first * row)
        return
    if start % row:
        yield from _within_row(shape, first, start % row, row)
        first += 1
    if last > first:
        yield ((first, last), *rows), (last - first) * row
    yield from _within_row(shape, last, 0, stop % row)


def _within_row(shape: Sequence[int], row: int, start: int, stop: int) -> Iterator[tuple[Slices, int]]:
    for slices, count in boxes_of(shape[1:], start, stop):
        yield ((row, row + 1), *slices), count


class ZeroState:
    """The state of a DeepSpeed engine's trained parameters: float32 weights, AdamW's moments, the step's number.

    Args: engine: DeepSpeed's. parameters: the trained ones by logical name. rank: of the data-parallel processes.
    """

    def __init__(self, engine: Any, parameters: dict[str, nn.Parameter], stage: int, rank: int) -> None:
        self._zero, self._basic = engine.optimizer, engine.basic_optimizer
        self._parameters, self._stage, self._rank = parameters, stage, rank
        if not isinstance(self._basic, torch.optim.AdamW | torch.optim.SGD):
            raise CheckpointError(
                f"the state of DeepSpeed's own {type(self._basic).__name__} can't be saved: set optimizer.type in the "
                f"ds_config.json to AdamW, or leave the section out"
            )
        self._shares: list[_Share] = []
        self._copies: dict[int, dict[str | None, Tensor]] = {}  # of sub-groups on a disk; None: the weights

    def fragments(self) -> list[Fragment]:
        """This process's boxes. Those of an offloaded state may be copies: `adopt` puts them back."""
        self._begin_states()
        self._shares = []
        self._copies = {group: self._copied(group) for group in self._groups_on_disk()}
        found: list[Fragment] = []
        for name, parameter in self._parameters.items():
            found += self._boxes(f"model.{name}", parameter, None)
            for key in _MOMENTS if self._has_moments else ():
                found += self._boxes(f"optimizer.{name}.{key}", parameter, key)
            if self._has_moments:
                found.append(Fragment(f"optimizer.{name}.step", self._step(), (), ()))
        return found

    def adopt(self, fragments: Sequence[Fragment]) -> None:
        """Take over what was written into `fragments`, the last that were asked for: the weights follow their masters.

        All processes must call it.
        """
        for share in self._shares:
            self._put_back(share)
        self._write_copies()
        steps = [fragment.tensor for fragment in fragments if fragment.name.endswith(".step")]
        for state in self._basic.state.values():
            if "step" in state and steps:
                state["step"].copy_(steps[0])
        self._shares, self._copies = [], {}
        self._refresh_weights()

    @property
    def _has_moments(self) -> bool:
        return isinstance(self._basic, torch.optim.AdamW)

    def _step(self) -> Tensor:
        steps = (state["step"] for state in self._basic.state.values() if "step" in state)
        return next((step.detach().float().cpu().clone() for step in steps), torch.zeros(()))

    def _boxes(self, name: str, parameter: nn.Parameter, key: str | None) -> Iterator[Fragment]:
        located = self._locate(parameter, key)
        if located is None:
            return
        share, start = located
        self._shares.append(share)
        shape, offset = tuple(getattr(parameter, "ds_shape", parameter.shape)), 0
        for slices, count in boxes_of(shape, start, start + share.values.numel()):
            box = share.values[offset : offset + count].view([stop - first for first, stop in slices])
            yield Fragment(name, box, shape, slices)
            offset += count

    def _locate(self, parameter: Any, key: str | None) -> tuple[_Share, int] | None:
        """This process's share of a tensor, and where it begins."""
        if self._stage == 3:
            return self._locate_in_partition(parameter, key)
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            return None
        flat = self._flat_masters()[mapping.param_group_index]
        held, address = flat if key is None else self._basic.state[flat][key], mapping.get_hp_fragment_address()
        values = held.detach().narrow(0, address.start, address.numel)
        return _Share(parameter, key, values, values), int(mapping.lp_fragment_address.start)

    def _locate_in_partition(self, parameter: Any, key: str | None) -> tuple[_Share, int] | None:
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        copies, first, length = self._copies_of(parameter)
        if copies is not None:
            whole = copies[key].narrow(0, first, length)
        elif key is None:
            whole = safe_get_local_fp32_param(parameter).detach()
        else:
            whole = safe_get_local_optimizer_state(parameter, key).detach()
        start = self._rank * whole.numel()
        count = min(whole.numel(), parameter.ds_numel - start)
        return (_Share(parameter, key, whole[:count], whole), start) if count > 0 else None

    def _put_back(self, share: _Share) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        if self._stage != 3 or self._copies_of(share.parameter)[0] is not None:
            return  # a view of what DeepSpeed holds, or of what goes to the disk as a whole
        if share.key is None:
            safe_set_local_fp32_param(share.parameter, share.whole.clone())
        else:
            safe_set_local_optimizer_state(share.parameter, share.whole.clone(), share.key)

    def _begin_states(self) -> None:
        """Moments of zero, where no step was taken yet."""
        on_disk = self._groups_on_disk()
        for group, flat in enumerate(self._flat_masters() if self._has_moments else ()):
            if flat is None or self._basic.state.get(flat):
                continue
            with self._at_hand(group, writes=True) if group in on_disk else nullcontext():
                zeros = {key: torch.zeros_like(flat, memory_format=torch.preserve_format) for key in _MOMENTS}
                self._basic.state[flat] = {"step": torch.zeros((), dtype=torch.float32, device=flat.device), **zeros}

    def _groups_on_disk(self) -> list[int]:
        """Sub-groups whose master weights and moments wait in files: their tensors are empty until they are read."""
        if self._stage != 3:
            return []
        return [i for i in range(len(self._zero.fp16_groups)) if self._zero._swappable_optimizer_subgroup(i)]

    @contextmanager
    def _at_hand(self, group: int, writes: bool) -> Iterator[None]:
        """Within this context a sub-group's tensors are in DeepSpeed's buffers, which the next one takes over.

        writes: whether they go to the disk again; else they are let go.
        """
        self._zero._optimizer_states_and_gradient_swap_in(group)
        yield
        if writes:
            self._zero._optimizer_states_and_gradient_swap_out(group)
        else:
            self._zero._release_swap_buffers(group)

    def _held(self, group: int) -> dict[str | None, Tensor]:
        flat = self._flat_masters()[group]
        held: dict[str | None, Tensor] = {None: flat.detach()}
        held.update((key, self._basic.state[flat][key]) for key in _MOMENTS if self._has_moments)
        return held

    def _copied(self, group: int) -> dict[str | None, Tensor]:
        folder = self._zero.optimizer_swapper.swap_folder
        with self._at_hand(group, writes=False):
            return {key: _on_disk(tensor, folder) for key, tensor in self._held(group).items()}

    def _copies_of(self, parameter: Any) -> tuple[dict[str | None, Tensor] | None, int, int]:
        """Copies of the parameter's sub-group, where that is on a disk; where in them its share begins; its length."""
        group, first, length = self._zero.grad_position[self._zero.get_param_id(parameter)]
        return self._copies.get(group), first, length

    def _write_copies(self) -> None:
        for group, copies in self._copies.items():
            with self._at_hand(group, writes=True):
                for key, tensor in self._held(group).items():
                    tensor.copy_(copies[key])

    def _flat_masters(self) -> list[Tensor]:
        names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
        return next(list(getattr(self._zero, name)) for name in names if hasattr(self._zero, name))

    @torch.no_grad()
    def _refresh_weights(self) -> None:
        from deepspeed.utils import safe_get_full_fp32_param

        if self._stage != 3:
            for parameter in self._parameters.values():
                parameter.data.copy_(safe_get_full_fp32_param(parameter))
            return
        on_disk = self._groups_on_disk()
        for group in range(len(self._zero.fp16_groups)):
            with self._at_hand(group, writes=False) if group in on_disk else nullcontext():
                self._zero._reassign_or_swap_out_partitioned_parameters(group)
        whole = [p for p in self._zero.persistent_parameters if p.ds_status.name == "AVAILABLE"]
        if whole:
            whole[0].partition(whole)


def _on_disk(tensor: Tensor, folder: str) -> Tensor:
    """A copy in a file without a name, which goes when the copy does: the host's memory need not hold it."""
    handle, path = tempfile.mkstemp(suffix=".copy", dir=folder)
    os.close(handle)
    try:
        copy = torch.from_file(path, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    finally:
        Path(path).unlink()
    return copy.copy_(tensor)
