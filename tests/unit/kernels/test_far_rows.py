"""Rows further from each other than 32 bits count elements: a fused activation of 400,000 tokens has 2.5e9 of them.

The memory is reserved and hardly written, so it costs nothing; under Triton's interpreter int32 wraps as on a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

SCRIPT = """
import mmap
import torch
import triton
import triton.language as tl
from tunesmith.kernels.cross_entropy import IGNORED, cross_entropy_and_grad_reference_
from tunesmith.kernels.cross_entropy_triton import cross_entropy_and_grad_operator
from tunesmith.kernels.rms_norm import rms_norm_backward_reference, rms_norm_reference
from tunesmith.kernels.rms_norm_triton import (
    rms_norm_again_operator, rms_norm_backward_operator, rms_norm_operator,
)
from tunesmith.kernels.rope import rope_reference_
from tunesmith.kernels.rope_triton import rope_operator
from tunesmith.kernels.swiglu import swiglu_reference
from tunesmith.kernels.swiglu_triton import swiglu_operator
from tunesmith.kernels.swiglu_low_rank import swiglu_low_rank_backward_reference, swiglu_low_rank_reference
from tunesmith.kernels.swiglu_low_rank_grads import swiglu_low_rank_grads_reference
from tunesmith.kernels.swiglu_low_rank_grads_triton import swiglu_low_rank_grads_operator
from tunesmith.kernels.swiglu_low_rank_triton import (
    swiglu_low_rank_backward_in_place_operator, swiglu_low_rank_operator,
)

STRIDE, ROWS, WIDTH = 2**30 + 64, 4, 32
NORESERVE = 0x4000
SIZE = 4 * (STRIDE * (ROWS - 1) + WIDTH)
pages = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
store = torch.frombuffer(pages, dtype=torch.float32)
close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def far(values):
    rows = store.as_strided((ROWS, WIDTH), (STRIDE, 1))
    return rows.copy_(values)


@triton.jit
def offsets_kernel(out, stride):
    row = tl.arange(0, 4)
    tl.store(out + row, (row * stride).to(tl.int64))


found = torch.empty(4, dtype=torch.int64)
offsets_kernel[(1,)](found, STRIDE)
assert found[1] == STRIDE and found[2] != 2 * STRIDE, "without a cast an offset must wrap, or this proves nothing"

torch.manual_seed(0)
near, grad, weight = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH), torch.randn(WIDTH)
y, rstd = rms_norm_reference(near, weight, 1e-5)
for ours, theirs in zip(rms_norm_operator(far(near), weight, 1e-5), (y, rstd)):
    close(ours, theirs)
close(rms_norm_again_operator(far(near), weight, rstd), y)
add = torch.randn(ROWS, WIDTH)
expected = rms_norm_backward_reference(grad, near, weight, rstd, add, True)
for place in range(3):
    tensors = [grad, near, add]
    tensors[place] = far(tensors[place])
    values = tensors[0], tensors[1], weight, rstd, tensors[2], True
    for ours, theirs in zip(rms_norm_backward_operator(*values), expected):
        close(ours, theirs)

heads, angles = near.view(ROWS, 2, 16), torch.randn(ROWS, 8)
turned = heads.clone()
rope_reference_(turned, angles.cos(), angles.sin())
rows = far(near)
rope_operator(rows.view(ROWS, 2, 16), angles.cos(), angles.sin(), False)
close(rows, turned.view(ROWS, WIDTH))

low, up = torch.randn(ROWS, 4), torch.randn(WIDTH, 4)
dlow, down, grad_h = torch.randn(ROWS, 4), torch.randn(4, WIDTH // 2), torch.randn(ROWS, WIDTH // 2)
close(swiglu_operator(far(near)), swiglu_reference(near))
close(swiglu_low_rank_operator(far(near), low, up), swiglu_low_rank_reference(near, low, up))
factors = (low, up, dlow, down)
expected, h = swiglu_low_rank_backward_reference(grad_h, near, *factors, True)
rows = far(near)
close(swiglu_low_rank_backward_in_place_operator(grad_h, rows, *factors, True), h)
close(rows, expected)
sums = swiglu_low_rank_grads_reference(grad_h, near.clone(), *factors)
rows = far(near)
for ours, theirs in zip(swiglu_low_rank_grads_operator(grad_h, rows, *factors), sums):
    close(ours, theirs)
close(rows, expected)

targets, logits = torch.tensor([0, 31, IGNORED, 7]), near.clone()
losses = cross_entropy_and_grad_reference_(logits, targets)
rows = far(near)
close(cross_entropy_and_grad_operator(rows, targets, IGNORED, 1.0, None), losses)
close(rows, logits)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is reserved without being given by Linux")
def test_kernels_of_a_long_sequences_step_count_in_64_bits(check_interpreted: Callable[[str], None]) -> None:
    check_interpreted(SCRIPT)
