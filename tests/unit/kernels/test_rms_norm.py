"""RMSNorm kept apart from autograd: against the eager layer and autograd, and the kernels against the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tunesmith.kernels.launch import in_rows, row_strides, tile
from tunesmith.kernels.rms_norm import rms_norm, rms_norm_again, rms_norm_backward
from tunesmith.model.layers import RMSNorm

EPS = 1e-5


def norm_of(width: int, dtype: torch.dtype) -> RMSNorm:
    norm = RMSNorm(width, EPS).to(dtype)
    torch.nn.init.normal_(norm.weight, mean=1.0, std=0.3, generator=torch.Generator().manual_seed(7))
    return norm


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 48), (3, 96), (17, 200), (5, 3, 16)])
def test_forward_has_the_bits_of_the_eager_layer(
    shape: tuple[int, ...], dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    norm, x = norm_of(shape[-1], weight_dtype), random(shape, dtype)
    y, rstd = rms_norm(x, norm.weight.detach(), EPS)
    assert torch.equal(y, norm(x))
    assert (rstd.shape, rstd.dtype) == (shape[:-1], torch.float32)
    assert torch.equal(rms_norm_again(x, norm.weight.detach(), rstd), y)


@pytest.mark.parametrize("shape", [(1, 48), (17, 200), (5, 3, 16)])
def test_backward_equals_autograd(shape: tuple[int, ...]) -> None:
    norm, x = norm_of(shape[-1], torch.float64), random(shape, torch.float32).requires_grad_()
    norm.float()
    grad_y, add = random(shape, torch.float32, 1), random(shape, torch.float32, 2)
    norm(x).backward(grad_y)
    weight = norm.weight.detach()
    _, rstd = rms_norm(x.detach(), weight, EPS)
    grad_x, grad_weight = rms_norm_backward(grad_y, x.detach(), weight, rstd, None, True)
    torch.testing.assert_close(grad_x, x.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_weight, norm.weight.grad, rtol=1e-5, atol=1e-5)
    with_add, none = rms_norm_backward(grad_y, x.detach(), weight, rstd, add, False)
    torch.testing.assert_close(with_add, grad_x + add, rtol=1e-6, atol=1e-6)
    assert none is None


def test_the_stream_is_added_before_the_only_rounding() -> None:
    """The norm's gradient is a little more than half a unit of the stream's 1: rounded by itself it would be a tie."""
    x, weight = torch.ones(1, 64, dtype=torch.bfloat16), torch.ones(64)
    grad_y = torch.full((1, 64), -(2.0**-19), dtype=torch.bfloat16)
    grad_y[0, 0] = 2.0**-8 * (1 + 2.0**-6)
    _, rstd = rms_norm(x, weight, 0.0)
    alone, _ = rms_norm_backward(grad_y, x, weight, rstd, None, False)
    assert float(alone[0, 0]) == 2.0**-8
    assert float(torch.ones_like(alone)[0, 0] + alone[0, 0]) == 1.0
    grad_x, _ = rms_norm_backward(grad_y, x, weight, rstd, torch.ones_like(alone), False)
    assert float(grad_x[0, 0]) == 1.0 + 2.0**-7
    assert grad_x.dtype == torch.bfloat16


def test_heads_of_a_fused_projection_need_no_copy() -> None:
    qkv = random((5, 8 * 16), torch.bfloat16)
    heads = qkv.view(5, 8, 16)[:, 2:5]
    weight = norm_of(16, torch.float32).weight.detach()
    y, rstd = rms_norm(heads, weight, EPS)
    assert torch.equal(y, rms_norm(heads.contiguous(), weight, EPS)[0])
    assert y.is_contiguous()
    assert in_rows(heads) is heads
    assert row_strides(heads) == (128, 16)
    assert row_strides(qkv) == (128, 0)
    assert rstd.shape == (5, 3)


@pytest.mark.parametrize("width", [1, 16, 48, 128, 3584, 8192, 16384])
def test_tiles_hold_whole_rows_in_powers_of_two(width: int) -> None:
    rows, columns, warps = tile(width)
    assert width <= columns < max(2 * width, 2)
    assert rows * columns >= 2048
    assert [n & (n - 1) for n in (rows, columns, warps)] == [0, 0, 0]


KERNEL = """
import torch
from tunesmith.kernels import launch, rms_norm_triton
from tunesmith.kernels.rms_norm import rms_norm_backward_reference, rms_norm_reference
from tunesmith.kernels.rms_norm_triton import (
    rms_norm_again_operator, rms_norm_backward_operator, rms_norm_operator)

generator = torch.Generator().manual_seed(0)
def random(*shape): return torch.randn(shape, generator=generator)
# The interpreter cuts bfloat16 off where a GPU rounds it: a unit in the last place for each of three roundings.
tolerance = {torch.float32: 2e-6, torch.float16: 2**-9, torch.bfloat16: 2**-5}
def close(mine, truth, dtype, terms=1):
    assert mine.dtype == truth.dtype and mine.shape == truth.shape, (mine.dtype, mine.shape, truth.shape)
    limit = tolerance[dtype]
    torch.testing.assert_close(mine.float(), truth.float(), rtol=limit, atol=limit * terms)
def check(x, weight, grad_y, add):
    y, rstd = rms_norm_operator(x, weight, 1e-5)
    truth, true_rstd = rms_norm_reference(x, weight, 1e-5)
    close(y, truth, x.dtype); close(rstd, true_rstd, torch.float32)
    assert torch.equal(rms_norm_again_operator(x, weight, rstd), y)
    for stream in (None, add):
        for wanted in (False, True):
            grad_x, grad_w = rms_norm_backward_operator(grad_y, x, weight, true_rstd, stream, wanted)
            true_x, true_w = rms_norm_backward_reference(grad_y, x, weight, true_rstd, stream, wanted)
            close(grad_x, true_x, x.dtype, 4)
            if wanted: close(grad_w, true_w, x.dtype, 20)
            else: assert grad_w.numel() == 0
check(random(20, 200), random(200), random(20, 200), random(20, 200))
# Tiles and all that goes by them an eighth of what they are: widths eight times as large have the same launches. And
# sums of four rows at once: several rounds, some of them with rows missing.
launch.TILE //= 8
launch._VALUES_PER_WARP //= 8
rms_norm_triton._BYTES_AHEAD_PER_WARP //= 8
rms_norm_triton._SUM_ROWS = 4
# The last: more tiles than programs, so that each takes several, for some one more than for others.
shapes = [(1, 6), (3, 448), (90, 12), (100, 25), (5, 512), (203, 12)]
for dtype in tolerance:
    for rows, width in shapes if dtype == torch.float32 else shapes[3:]:
        x, grad_y, add = (random(rows, width).to(dtype) for _ in range(3))
        check(x, random(width).to(dtype), grad_y, add)
        if dtype != torch.float32 and rows == 100:
            check(x, random(width), grad_y, add)
    # Heads: of a fused projection, and more rows than one tile; the gradient with strides of its own.
    heads = random(7, 12 * 6).to(dtype).view(7, 12, 6)[:, 2:11]
    check(heads, random(6), random(9, 7, 6).to(dtype).transpose(0, 1), random(7, 9, 6).to(dtype))
    wide = random(5, 39).to(dtype)
    check(wide[:, 13:], random(26), wide[:, :26], wide[:, 7:33])
assert rms_norm_operator(random(0, 48), random(48), 1e-5)[0].shape == (0, 48)
grad_x, grad_w = rms_norm_backward_operator(random(0, 48), random(0, 48), random(48), random(0), None, True)
assert torch.equal(grad_w, torch.zeros(48))
x, weight = random(5, 48), random(48)
first = rms_norm_backward_operator(x, x, weight, random(5), None, True)
tests = ("test_schema", "test_faketensor")
torch.library.opcheck(rms_norm_operator, (x, weight, 1e-5), test_utils=tests)
torch.library.opcheck(rms_norm_again_operator, (x, weight, random(5)), test_utils=tests)
torch.library.opcheck(rms_norm_backward_operator, (x, x, weight, random(5), None, True), test_utils=tests)
torch.library.opcheck(rms_norm_backward_operator, (x, x, weight, random(5), x, False), test_utils=tests)
"""


def test_kernels_equal_the_reference_under_tritons_interpreter(check_interpreted: Callable[[str], None]) -> None:
    check_interpreted(KERNEL)
