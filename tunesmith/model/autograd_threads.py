"""Where autograd works on a GPU: in a thread of its own, and on the stream that each node was made on."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor


@cache
def wake_autograd(device: torch.device) -> None:
    """Give autograd's thread of a GPU the CUDA context, by one tiny kernel; once, and nothing on a CPU.

    A thread has none before its first kernel. Where a matrix product comes before that, torch warns of cuBLAS without
    a context.
    """
    if device.type != "cuda":
        return
    with torch.enable_grad():
        one = torch.ones((), device=device, requires_grad=True)
        (one * 2).backward()


def renew_accumulators(parameters: Iterable[Tensor]) -> None:
    """Let what uses `parameters` from now on end in new AccumulateGrad nodes, made on the stream that is current then.

    A parameter has one such node as long as any graph with it lives (of a loss that someone still holds, say), and it
    keeps the stream that it was made on. A backward pass joins that stream; joining the default stream to one that is
    recorded breaks the recording. Graphs that live keep their node, and gradients, hooks and values stay as they are.

    torch forgets a leaf's node when its data becomes that of another dtype (as `Module.to` makes it).
    """
    for parameter in parameters:
        data = parameter.data
        other = torch.float32 if data.dtype != torch.float32 else torch.bfloat16
        parameter.data = data.new_empty(0, dtype=other)
        parameter.data = data
