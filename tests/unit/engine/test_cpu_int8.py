"""int8 products on a CPU: as the dequantised weight gives them, whichever way they go."""

from __future__ import annotations

import pytest
import torch

from tunesmith.engine import cpu_int8
from tunesmith.engine.cpu_int8 import can_pack_int8, int8_of
from tunesmith.kernels.gemv import CPU_SPLIT_TOKENS
from tunesmith.model.int8 import Int8Linear


def make_linear(width: int, bias: bool) -> Int8Linear:
    generator = torch.Generator().manual_seed(0)
    linear = Int8Linear(width, {"a": 40, "b": 24}, bias, dtype=torch.bfloat16)
    for part, rows in linear.parts.items():
        weight = torch.randn(rows, width, generator=generator) * 0.05
        linear.load_part(part, weight, torch.randn(rows, generator=generator) if bias else None)
    return linear


@pytest.mark.parametrize("is_large", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "bias"), [(128, True), (104, False)])
def test_products_are_those_of_the_dequantised_weight(
    monkeypatch: pytest.MonkeyPatch, is_large: bool, dtype: torch.dtype, width: int, bias: bool
) -> None:
    if is_large:
        if not can_pack_int8():
            pytest.skip("this build of torch lays out no int8 weights")
        monkeypatch.setattr(cpu_int8, "LARGE", 1)
    linear = make_linear(width, bias)
    with torch.inference_mode():
        product = int8_of(linear)
        for rows in (1, 2, 5, CPU_SPLIT_TOKENS + 1):
            x = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)).to(dtype)
            x[0, 3] = 30.0
            given = x.clone()
            expected = linear.weight(torch.float32) @ x.float().t()
            expected = expected.t() if linear.bias is None else expected.t() + linear.bias.float()
            found = product(x)
            assert found.dtype == dtype
            assert torch.equal(x, given)
            torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=4e-2)


def test_a_row_of_zeros_stays_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its scale would be zero, and what is divided by it no number."""
    monkeypatch.setattr(cpu_int8, "LARGE", 1)
    linear = make_linear(128, False)
    with torch.inference_mode():
        assert int8_of(linear)(torch.zeros(2, 128)).abs().max() == 0
