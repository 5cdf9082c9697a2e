"""NF4 into fp8: row scales that bound the rows, values near those of NF4, both layouts, the kernel."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tunesmith.kernels.fp8 import dequantize_rows
from tunesmith.kernels.nf4 import NF4Weight, dequantize_reference, quantize_nf4
from tunesmith.kernels.nf4_fp8 import nf4_row_scales, nf4_to_fp8

SHAPES = [(1, 64), (17, 192), (48, 128), (5, 96), (33, 200), (7, 5)]


def held(shape: tuple[int, int], double: bool, dtype: torch.dtype = torch.float32) -> NF4Weight:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])).to(dtype)
    return quantize_nf4(weight, double)


def values(weight: NF4Weight) -> Tensor:
    return dequantize_reference(weight, torch.float32)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_row_passes_its_scale_and_values_are_near(shape: tuple[int, int], double: bool) -> None:
    nf4 = held(shape, double)
    weight = nf4_to_fp8(nf4)
    assert (values(nf4).abs().amax(1) <= weight.scale * 448 * (1 + 1e-6)).all()
    error = dequantize_rows(weight.codes, weight.scale, torch.float32) - values(nf4)
    assert error.norm() / values(nf4).norm() < 0.03


def test_the_error_is_that_of_the_format() -> None:
    nf4 = held((256, 512), True)
    weight = nf4_to_fp8(nf4)
    error = dequantize_rows(weight.codes, weight.scale, torch.float32) - values(nf4)
    assert 0.02 < error.norm() / values(nf4).norm() < 0.028


@pytest.mark.parametrize("shape", [(17, 192), (48, 128)])
def test_whole_blocks_bound_their_rows_tightly(shape: tuple[int, int]) -> None:
    """One of a block's weights has the code of 1: the largest scale of the row is its largest magnitude."""
    nf4 = held(shape, double=False)
    assert torch.allclose(nf4_row_scales(nf4) * 448, values(nf4).abs().amax(1), rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_transposed_codes_are_the_same_codes(shape: tuple[int, int]) -> None:
    nf4 = held(shape, True)
    weight, turned = nf4_to_fp8(nf4), nf4_to_fp8(nf4, transposed=True)
    assert turned.codes.is_contiguous()
    assert turned.shape == weight.shape == shape
    assert torch.equal(turned.scale, weight.scale)
    assert torch.equal(turned.codes.float(), weight.codes.float().t())


def test_parts_are_rows_below_each_other() -> None:
    parts = [held((5, 128), True), held((3, 128), False)]
    whole = nf4_to_fp8(parts)
    assert whole.shape == (8, 128)
    assert torch.equal(whole.codes.float(), torch.cat([nf4_to_fp8(part).codes.float() for part in parts]))
    assert torch.equal(whole.scale, torch.cat([nf4_row_scales(part) for part in parts]))
    again = nf4_to_fp8(parts, scale_F=whole.scale)
    assert torch.equal(again.codes.float(), whole.codes.float())


KERNEL = """
from tunesmith.kernels.nf4 import quantize_nf4
from tunesmith.kernels.nf4_fp8 import nf4_row_scales, nf4_to_fp8_reference
from tunesmith.kernels.nf4_fp8_triton import nf4_to_fp8_codes, nf4_to_fp8_operator

generator = torch.Generator().manual_seed(0)
for rows, width in (((37, 3), 192), ((1,), 64), ((70, 17), 448)):
    for double in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            parts = [quantize_nf4(torch.randn(f, width, generator=generator).to(dtype), double) for f in rows]
            scale = nf4_row_scales(parts)
            for transposed in (False, True):
                truth = nf4_to_fp8_reference(parts, scale, transposed)
                mine = nf4_to_fp8_codes(parts, scale, transposed)
                assert torch.equal(mine.view(torch.uint8), truth.view(torch.uint8)), (rows, double, transposed)
part = parts[0]
arguments = ([part.codes], [part.scales], [part.scale_scales], [part.offset], scale, [70], 448, True)
torch.library.opcheck(nf4_to_fp8_operator, arguments, test_utils=("test_schema", "test_faketensor"))
"""


def test_kernel_equals_the_reference_under_tritons_interpreter(
    check_interpreted_fp8: Callable[[str], None],
) -> None:
    check_interpreted_fp8(KERNEL)
