"""The Triton kernel that multiplies in place, as a torch custom operator. Imported only where Triton is installed."""

# Triton's decorator and its kernels' arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from tunesmith.kernels.jit import jit
from tunesmith.kernels.launch import current
from tunesmith.units import ceil_div

# Values of one program: of 2-byte values four loads of 16 bytes a thread.
BLOCK = 4096
WARPS = 4


@torch.library.custom_op("tunesmith::scale_", mutates_args=("values",))
def scale_operator(values: Tensor, factor: Tensor) -> None:
    """`kernels.scale.scale_` of a contiguous tensor."""
    if values.numel():
        with current(values.device):
            grid = (ceil_div(values.numel(), BLOCK),)
            _scale_kernel[grid](values, factor, values.numel(), BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=True)


@scale_operator.register_fake
def _scale_fake(values: Tensor, factor: Tensor) -> None:
    return None


@jit
def _scale_kernel(values, factor, count, BLOCK: tl.constexpr) -> None:
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(values + index, mask=index < count).to(tl.float32) * tl.load(factor).to(tl.float32)
    tl.store(values + index, value.to(values.dtype.element_ty), mask=index < count)
