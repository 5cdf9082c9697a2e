"""The stream's sum and its norm in one pass: against both apart, kernel against reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tunesmith.kernels.add_rms_norm import add_rms_norm_
from tunesmith.model.layers import RMSNorm

KERNEL = """
import torch
from tunesmith.kernels.add_rms_norm import add_rms_norm_reference_
from tunesmith.kernels.add_rms_norm_triton import add_rms_norm_operator

for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 0.1)):  # the interpreter cuts bfloat16, not rounds
    for shape in ((1, 48), (5, 200)):
        generator = torch.Generator().manual_seed(shape[0])
        stream, delta = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        weight, other = torch.rand(shape[1], generator=generator), stream.clone()
        wanted = add_rms_norm_reference_(stream, delta, weight, 1e-5)
        found = add_rms_norm_operator(other, delta, weight, 1e-5)
        torch.testing.assert_close(other, stream, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_has_the_bits_of_sum_and_norm_apart(dtype: torch.dtype) -> None:
    norm = RMSNorm(48, 1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight, mean=1.0, std=0.3, generator=torch.Generator().manual_seed(7))
    stream, delta = (torch.randn(3, 48, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(2))
    wanted = stream + delta
    y = add_rms_norm_(stream, delta, norm.weight.detach(), 1e-5)
    assert torch.equal(stream, wanted)
    assert torch.equal(y, norm(wanted))


def test_the_kernel_equals_the_reference(check_interpreted: Callable[[str], None]) -> None:
    check_interpreted(KERNEL)
