"""The Triton kernel of the gradients' norm, as a torch custom operator. Imported only where Triton is installed."""

# Triton's decorator and its kernels' arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from tunesmith.kernels.jit import jit
from tunesmith.kernels.launch import current
from tunesmith.units import ceil_div

# Values read at once: of 2-byte values two loads of 16 bytes a thread, and the loads of several rounds are in flight.
BLOCK = 2048
WARPS = 4


@torch.library.custom_op("tunesmith::part_norms", mutates_args=())
def part_norms_operator(gradients: list[Tensor], part: int) -> Tensor:
    """`kernels.grad_norm.part_norms`, a launch for each gradient, a program for each part.

    Args: part: values of a part, a multiple of BLOCK.
    """
    norms = _empty(gradients, part)
    start = 0
    with current(norms.device):
        for gradient in gradients:
            programs = ceil_div(gradient.numel(), part)
            if programs:
                _norm_kernel[(programs,)](
                    gradient,
                    norms,
                    start,
                    gradient.numel(),
                    BLOCK=BLOCK,
                    ROUNDS=part // BLOCK,
                    num_warps=WARPS,
                    enable_fp_fusion=True,
                )
            start += programs
    return norms


@part_norms_operator.register_fake
def _part_norms_fake(gradients: list[Tensor], part: int) -> Tensor:
    return _empty(gradients, part)


def _empty(gradients: list[Tensor], part: int) -> Tensor:
    count = sum(ceil_div(gradient.numel(), part) for gradient in gradients)
    return gradients[0].new_empty(count, dtype=torch.float32)


@jit(do_not_specialize=["start"])
def _norm_kernel(values, norms, start, count, BLOCK: tl.constexpr, ROUNDS: tl.constexpr) -> None:
    first = tl.program_id(0).to(tl.int64) * (BLOCK * ROUNDS)
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(ROUNDS):
        index = first + i * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(values + index, mask=index < count, other=0.0).to(tl.float32)
        total += value * value
    tl.store(norms + start + tl.program_id(0), tl.sqrt(tl.sum(total, axis=0)))
