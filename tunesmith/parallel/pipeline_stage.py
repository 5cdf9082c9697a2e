"""torch's pipeline stage and schedules, as this project runs them. Imported late: torch brings its compiler along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from tunesmith.parallel.mesh import Mesh


@dataclass(frozen=True)
class Wire:
    """What goes from stage to stage for one micro-batch: [rows, columns] of a dtype."""

    rows: int
    columns: int
    dtype: torch.dtype

    def buffer(self, device: torch.device, *, requires_grad: bool = False) -> Tensor:
        """An uninitialised one."""
        return torch.empty(self.rows, self.columns, dtype=self.dtype, device=device, requires_grad=requires_grad)


class _Stage(PipelineStage):
    """A stage that receives into few buffers: torch's has two for each micro-batch of a step.

    A buffer is free for another micro-batch when its own has been through the backward pass.
    """

    in_flight = 1
    _is_shared = False

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[Any]:
        """The first call finds torch's buffers made, and unused."""
        if not self._is_shared:
            self._share(self.args_recv_info)
            self._share(self.grad_recv_info)
            self._is_shared = True
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def _share(self, received: Mapping[int, Sequence[Any]]) -> None:
        for chunk, infos in received.items():
            for info, first in zip(infos, received[chunk % self.in_flight], strict=True):
                if getattr(info, "buffer", None) is not None:
                    info.buffer = first.buffer

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        """Leaves no gradient on the buffer, where the next micro-batch's would be added to it."""
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        for info in self.args_recv_info[bwd_chunk_id]:
            buffer = getattr(info, "buffer", None)
            if buffer is not None:
                buffer.grad = None


def make_schedule(module: nn.Module, mesh: Mesh, num_micro_batches: int, wire: Wire) -> Schedule1F1B | ScheduleGPipe:
    """One forward, one backward; all forwards first where there are fewer micro-batches than stages.

    There that is the same order on the first stage, and 1F1B refuses it.

    Args: module: takes the stream (on the first stage nothing) and returns it, on the last stage the loss, [1].
    """
    index, count = mesh.index("pp"), mesh.size("pp")
    meta = torch.device("meta")
    stream = wire.buffer(meta, requires_grad=True)
    loss = torch.empty(1, device=meta, requires_grad=True)
    stage = _Stage(
        module,
        index,
        count,
        mesh.device,
        input_args=() if index == 0 else (stream,),
        output_args=(loss,) if index == count - 1 else (stream,),
        group=mesh.group("pp"),
    )
    is_long = num_micro_batches >= count
    stage.in_flight = count - index if is_long else num_micro_batches
    kind = Schedule1F1B if is_long else ScheduleGPipe
    return kind(stage, num_micro_batches, loss_fn=_loss, scale_grads=False)


def _loss(output: Tensor, target: Tensor) -> Tensor:
    """The last stage's module has computed it."""
    return output.sum()
