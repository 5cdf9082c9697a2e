"""Multiplying in place by a number of the device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tunesmith.kernels.scale import scale_

KERNEL = """
import torch
from tunesmith.kernels.scale import scale_reference_
from tunesmith.kernels.scale_triton import scale_operator

generator = torch.Generator().manual_seed(0)
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for shape in ((3, 5), (17, 300), (4096,), (0,), ()):
        values = torch.randn(shape, generator=generator).to(dtype)
        factor = torch.tensor(1 / 3)
        mine, truth = values.clone(), values.clone()
        scale_operator(mine, factor)
        scale_reference_(truth, factor)
        # The interpreter cuts bfloat16 off where a GPU rounds it.
        bound = 2**-7 if dtype == torch.bfloat16 else 0
        assert torch.allclose(mine.float(), truth.float(), rtol=bound, atol=0), (dtype, shape)
arguments = (torch.ones(4, 4), torch.tensor(2.0))
torch.library.opcheck(scale_operator, arguments, test_utils=("test_schema", "test_faketensor"))
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_factor_is_not_rounded_before(dtype: torch.dtype) -> None:
    values = torch.full((7, 3), 3.0, dtype=dtype)
    factor = torch.tensor(1 / 3)  # bfloat16 has 0.333984375
    scale_(values, factor)
    assert torch.equal(values, torch.ones(7, 3, dtype=dtype))


def test_kernel_equals_the_reference_under_tritons_interpreter(check_interpreted: Callable[[str], None]) -> None:
    check_interpreted(KERNEL)
