"""Transposes quantised to fp8: the rows of the transpose, products that sum over tokens, the kernel."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tunesmith.kernels.fp8 import fp8_product, quantize_rows_fp8
from tunesmith.kernels.fp8_columns import quantize_columns_fp8
from tunesmith.kernels.fp8_weight import padded


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 48), (3, 96), (17, 200), (32, 1)])
def test_columns_are_the_rows_of_the_transpose(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = random(*shape, dtype=dtype)
    codes, scale = quantize_columns_fp8(x)
    expected, expected_scale = quantize_rows_fp8(x.t().contiguous())
    assert codes.shape == (shape[1], padded(shape[0]))
    assert codes.is_contiguous()
    assert torch.equal(scale, expected_scale)
    assert torch.equal(codes[:, : shape[0]].float(), expected.float())
    assert codes[:, shape[0] :].float().eq(0).all()


def test_no_token_at_all_is_a_sum_of_zeros() -> None:
    codes, scale = quantize_columns_fp8(torch.empty(0, 16))
    assert codes.shape == (16, 16)
    assert fp8_product(codes, scale, codes, scale.view(-1), None, torch.float32).eq(0).all()


@pytest.mark.parametrize("num_tokens", [17, 160])
def test_a_weights_gradient_is_near_that_of_the_exact_product(num_tokens: int) -> None:
    """Both sides carry 3 bits of mantissa: 2.6 % each, 3.7 % together, whatever the number of tokens."""
    g, x = random(num_tokens, 48), random(num_tokens, 96, seed=1)
    (g_codes, g_scale), (x_codes, x_scale) = quantize_columns_fp8(g), quantize_columns_fp8(x)
    dw = fp8_product(g_codes, g_scale, x_codes, x_scale.view(-1), None, torch.float32)
    exact = g.t() @ x
    assert 0.01 < (dw - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(bad: float) -> None:
    x = random(20, 16)
    x[7, 3] = bad
    codes, scale = quantize_columns_fp8(x)
    dw = fp8_product(codes, scale, *_plain(quantize_columns_fp8(random(20, 16, seed=1))), None, torch.float32)
    assert dw[3].isnan().all()
    assert dw[torch.arange(16) != 3].isfinite().all()


def _plain(quantised: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return quantised[0], quantised[1].view(-1)


KERNELS = """
from tunesmith.kernels import fp8_columns_triton
from tunesmith.kernels.fp8_columns import quantize_columns_reference
from tunesmith.kernels.fp8_columns_triton import quantize_columns_operator

generator = torch.Generator().manual_seed(0)
# The first as it is launched; then tiles an eighth as large, of which the last takes several both ways.
for shape in [(130, 140), (1, 48), (3, 96), (17, 20), (130, 1), (80, 70)]:
    for dtype in (torch.float32, torch.bfloat16, torch.float16) if shape[0] >= 80 else (torch.float32,):
        x = torch.randn(shape, generator=generator).to(dtype)
        codes, scale = quantize_columns_operator(x)
        expected, expected_scale = quantize_columns_reference(x)
        assert torch.equal(scale, expected_scale), (shape, dtype)
        assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8)), (shape, dtype)
    fp8_columns_triton.LARGEST_TILE, fp8_columns_triton.CODES_TILE = (32, 32), (32, 32)
wide = torch.randn(33, 64, generator=generator)
codes, scale = quantize_columns_operator(wide[:, 16:40])  # a stride of rows
assert torch.equal(codes.view(torch.uint8), quantize_columns_reference(wide[:, 16:40])[0].view(torch.uint8))
assert quantize_columns_operator(wide.t())[0].shape == (33, 64)
zeros = torch.zeros(20, 48)
assert torch.equal(quantize_columns_operator(zeros)[1], quantize_columns_reference(zeros)[1])
assert quantize_columns_operator(torch.empty(0, 16))[0].float().eq(0).all()
wide[3, 5] = float("nan")
assert quantize_columns_operator(wide)[1].isnan().nonzero().tolist() == [[5, 0]]
torch.library.opcheck(quantize_columns_operator, (wide,), test_utils=("test_schema", "test_faketensor"))
"""


def test_the_kernels_equal_the_reference_under_tritons_interpreter(
    check_interpreted_fp8: Callable[[str], None],
) -> None:
    check_interpreted_fp8(KERNELS)
