"""fp8: codes and scales against a search of all values, products against the dequantised matrices, the kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tunesmith.errors import DeviceError
from tunesmith.kernels import fp8
from tunesmith.kernels.fp8 import (
    FP8,
    SMALLEST_SCALE,
    dequantize_fp8_weight,
    fp8_product,
    has_fp8,
    quantize_fp8_weight,
    quantize_rows_fp8,
    require_fp8,
    transpose_fp8,
)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def nearest_value(wide: Tensor) -> Tensor:
    """The nearest of the 253 values of e4m3, of two equally near the one with the even code."""
    every = torch.arange(256, dtype=torch.uint8)
    values = every.view(FP8).double()
    known = ~values.isnan() & (every != 128)  # -0 is 0 once more
    order = values[known].argsort()
    values, even = values[known][order], (every[known][order] % 2 == 0)
    upper = torch.bucketize(wide.double(), values).clamp(1, len(values) - 1)
    below, above = values[upper - 1], values[upper]
    to_below, to_above = wide.double() - below, above - wide.double()
    down = (to_below < to_above) | ((to_below == to_above) & even[upper - 1])
    return torch.where(down, below, above)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 48), (3, 96), (17, 200)])
def test_codes_are_the_nearest_values_of_rows_scaled_to_their_largest(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x = random(*shape, dtype=dtype)
    codes, scale = quantize_rows_fp8(x)
    assert codes.dtype == FP8
    assert scale.dtype == torch.float32
    assert scale.shape == (shape[0], 1)
    assert torch.allclose(scale, x.float().abs().amax(1, keepdim=True) / 448, rtol=1e-6)
    assert codes.float().abs().amax(1).eq(448).all()
    assert torch.equal(codes.double(), nearest_value(x.float() * (1 / scale)))


def test_columns_are_folded_in_before() -> None:
    x, fold = random(5, 48, dtype=torch.bfloat16), random(48, seed=1).abs()
    codes, scale = quantize_rows_fp8(x, fold)
    expected, expected_scale = quantize_rows_fp8(x.float() * fold)
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scale, expected_scale)


def test_a_row_of_zeros_has_a_scale_that_divides() -> None:
    codes, scale = quantize_rows_fp8(torch.cat((torch.zeros(1, 16), torch.full((1, 16), 1e-44))))
    assert scale.eq(SMALLEST_SCALE).all()
    assert codes.float().eq(0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(bad: float) -> None:
    x = random(2, 16)
    x[1, 3] = bad
    codes, scale = quantize_rows_fp8(x)
    y = fp8_product(codes, scale, torch.ones(16, 16).to(FP8), None, None, torch.float32)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random(37, 48)
    whole = quantize_fp8_weight(weight)
    monkeypatch.setattr(fp8, "CHUNK", 200)
    parts = quantize_fp8_weight(weight)
    assert torch.equal(whole.codes.view(torch.uint8), parts.codes.view(torch.uint8))
    assert torch.equal(whole.scale, parts.scale)
    assert torch.equal(dequantize_fp8_weight(whole), dequantize_fp8_weight(parts))


def test_a_weight_comes_back_within_the_format() -> None:
    weight = random(64, 200, dtype=torch.bfloat16)
    held = quantize_fp8_weight(weight)
    assert held.num_bytes == 64 * 200 + 64 * 4
    restored = dequantize_fp8_weight(held)
    assert restored.dtype == torch.bfloat16
    error = (dequantize_fp8_weight(held, torch.float32) - weight.float()).norm() / weight.float().norm()
    assert 0.02 < error < 0.03  # 3 bits of mantissa: uniform in a step of 2^-3, 2.6 % at the root mean square


def test_transpose_is_contiguous() -> None:
    codes = random(17, 48).to(FP8)
    turned = transpose_fp8(codes)
    assert turned.is_contiguous()
    assert torch.equal(turned.float(), codes.float().t())


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_product_is_that_of_the_dequantised_matrices(out_dtype: torch.dtype) -> None:
    (x_codes, x_scale), weight = quantize_rows_fp8(random(7, 96)), quantize_fp8_weight(random(48, 96, seed=1))
    bias = random(48, seed=2)
    exact = (x_codes.double() * x_scale) @ (weight.codes.double() * weight.scale[:, None]).t()
    y = fp8_product(x_codes, x_scale, weight.codes, weight.scale, bias, out_dtype)
    assert y.dtype == out_dtype
    assert torch.allclose(y.double(), exact + bias, rtol=2 * torch.finfo(out_dtype).eps, atol=1e-4)
    plain = fp8_product(x_codes, x_scale, weight.codes, None, None, torch.float32)
    assert torch.allclose(
        plain.double(), (x_codes.double() * x_scale) @ weight.codes.double().t(), rtol=1e-5, atol=1e-3
    )


def test_gradient_with_folded_scales_is_that_of_the_dequantised_weight() -> None:
    weight, g = quantize_fp8_weight(random(48, 96)), random(7, 48, seed=1)
    g_codes, g_scale = quantize_rows_fp8(g, weight.scale)
    dx = fp8_product(g_codes, g_scale, transpose_fp8(weight.codes), None, None, torch.float32)
    exact = g @ dequantize_fp8_weight(weight, torch.float32)
    assert (dx - exact).norm() / exact.norm() < 0.04


def test_an_old_gpu_is_refused_by_name_with_what_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA RTX A6000")
    assert not has_fp8("cuda")
    with pytest.raises(DeviceError, match=r"NVIDIA RTX A6000 \(sm_86\) has no fp8 products.*method.base=checkpoint"):
        require_fp8("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    assert has_fp8("cuda")
    require_fp8("cuda")
    require_fp8("cpu")
    assert not has_fp8("cpu")


KERNELS = """
from tunesmith.kernels import fp8_held_triton, fp8_triton
from tunesmith.kernels.fp8 import FP8, quantize_rows_reference
from tunesmith.kernels.fp8_triton import quantize_rows_operator, transpose_operator

def same(a, b):
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))

generator = torch.Generator().manual_seed(0)
float32, bfloat16, float16 = torch.float32, torch.bfloat16, torch.float16
# Rows at once, and rows that are read twice: whole steps of what is held at once, and a step with columns missing.
fp8_held_triton.FORMS = ()
shapes = {8192: [(1, 48), (3, 1), (5, 200), (2, 3584)], 64: [(2, 1), (2, 128), (3, 200)]}
for widest in (8192, 64):
    fp8_triton.WIDEST = widest
    for shape in shapes[widest]:
        for dtype in (float32, bfloat16, float16) if shape[1] == 200 else (float32,):
            x = torch.randn(shape, generator=generator).to(dtype)
            fold = torch.rand(shape[1], generator=generator)
            for factors in (None, fold):
                codes, scale = quantize_rows_operator(x, factors)
                expected, expected_scale = quantize_rows_reference(x, factors)
                assert same(codes, expected), (widest, shape, dtype)
                assert torch.equal(scale, expected_scale), (widest, shape, dtype)
wide = torch.randn(5, 64, generator=generator)
wide[:, 40:] *= 1000  # beside the rows: never looked at
assert same(quantize_rows_operator(wide[:, 16:40])[0], quantize_rows_reference(wide[:, 16:40])[0])  # a stride of rows
zeros = torch.zeros(2, 48)
assert torch.equal(quantize_rows_operator(zeros)[1], quantize_rows_reference(zeros)[1])
assert quantize_rows_operator(torch.empty(0, 48))[0].shape == (0, 48)
for shape in [(1, 48), (17, 200), (130, 257)]:
    codes = torch.randn(shape, generator=generator).to(FP8)
    assert same(transpose_operator(codes), codes.view(torch.uint8).t().contiguous())
# SwiGLU that is quantised as it is made has the bits of both apart.
from tunesmith.kernels.swiglu_fp8_triton import swiglu_rows_operator
from tunesmith.kernels.swiglu_triton import swiglu_operator
for rows, width in ((3, 48), (2, 4100)):
    gate_up = torch.randn(rows, 2 * width, generator=generator).to(float16)
    gate_up[0] = 0
    codes, scale = swiglu_rows_operator(gate_up)
    expected, expected_scale = quantize_rows_reference(swiglu_operator(gate_up))
    assert same(codes, expected), width
    assert torch.equal(scale, expected_scale), width
codes = transpose_operator(torch.randn(130, 257, generator=generator).to(FP8))
checks = ("test_schema", "test_faketensor")
torch.library.opcheck(quantize_rows_operator, (wide, torch.ones(64)), test_utils=checks)
torch.library.opcheck(quantize_rows_operator, (wide, None), test_utils=checks)
torch.library.opcheck(transpose_operator, (codes,), test_utils=checks[1:])  # torch compares no fp8 inputs
"""


def test_kernels_equal_the_reference_under_tritons_interpreter(
    check_interpreted_fp8: Callable[[str], None],
) -> None:
    check_interpreted_fp8(KERNELS)
