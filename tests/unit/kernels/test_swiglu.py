"""SwiGLU and its gradient: against the eager path and autograd, and the kernels against the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from tunesmith.kernels.swiglu import swiglu, swiglu_backward


def random(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("shape", [(1, 96), (3, 200), (17, 48)])
def test_forward_and_backward_equal_autograd(shape: tuple[int, int]) -> None:
    gate_up = random(shape).requires_grad_()
    gate, up = gate_up.chunk(2, dim=-1)
    expected = F.silu(gate) * up
    grad_h = random((shape[0], shape[1] // 2), seed=1)
    expected.backward(grad_h)
    torch.testing.assert_close(swiglu(gate_up.detach()), expected.detach(), rtol=1e-6, atol=1e-6)
    grad, h = swiglu_backward(grad_h, gate_up.detach(), want_h=False)
    torch.testing.assert_close(grad, gate_up.grad, rtol=1e-5, atol=1e-6)
    assert h is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_in_place_gives_the_same_bits(dtype: torch.dtype) -> None:
    gate_up, grad_h = random((5, 96), dtype), random((5, 48), dtype, 1)
    h = swiglu(gate_up)
    grad, again = swiglu_backward(grad_h, gate_up, want_h=True)
    assert again is not None
    assert torch.equal(again, h)
    elsewhere = torch.empty_like(gate_up)
    assert swiglu_backward(grad_h, gate_up, False, elsewhere)[0] is elsewhere
    assert torch.equal(elsewhere, grad)
    same, again = swiglu_backward(grad_h, gate_up, True, out=gate_up)
    assert same is gate_up
    assert torch.equal(gate_up, grad)
    assert again is not None
    assert torch.equal(again, h)
    assert (grad.dtype, h.dtype) == (dtype, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_once(dtype: torch.dtype) -> None:
    gate_up = random((50, 64), dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    torch.testing.assert_close(swiglu(gate_up), (F.silu(gate) * up).to(dtype), rtol=torch.finfo(dtype).eps, atol=0)


def test_far_from_zero_nothing_overflows() -> None:
    gate_up = torch.tensor([[-200.0, 200.0, -1e4, 3.0, 3.0, 3.0]])
    assert torch.equal(swiglu(gate_up), torch.tensor([[0.0, 600.0, 0.0]]))
    grad, _ = swiglu_backward(torch.ones(1, 3), gate_up, False)
    assert torch.equal(grad, torch.tensor([[0.0, 3.0, 0.0, 0.0, 200.0, 0.0]]))


KERNEL = """
import torch
from tunesmith.kernels.swiglu import swiglu_backward_reference, swiglu_reference
from tunesmith.kernels import swiglu_triton
from tunesmith.kernels.swiglu_triton import (
    swiglu_backward_in_place_operator, swiglu_backward_on_gpu, swiglu_backward_operator,
    swiglu_backward_out_operator, swiglu_operator)

generator = torch.Generator().manual_seed(0)
def random(*shape): return torch.randn(shape, generator=generator)
# The interpreter cuts bfloat16 off where a GPU rounds it.
tolerance = {torch.float32: 3e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}
for dtype, limit in tolerance.items():
    def close(mine, truth):
        assert mine.dtype == truth.dtype == dtype and mine.shape == truth.shape
        torch.testing.assert_close(mine, truth, rtol=limit, atol=limit)
    for rows, width in [(5, 200), (1, 48), (3, 112), (2, 1)] if dtype == torch.float32 else [(3, 112)]:
        wide, grad_h = (3 * random(rows, 2 * width + 8)).to(dtype), random(rows, width + 3).to(dtype)[:, 3:]
        for gate_up in (wide[:, :-8].contiguous(), wide[:, 8:]):
            h, (true_grad, true_h) = swiglu_operator(gate_up), swiglu_backward_reference(grad_h, gate_up, True)
            close(h, swiglu_reference(gate_up)); close(h, true_h)
            grad, none = swiglu_backward_on_gpu(grad_h, gate_up, False, None)
            assert none is None
            close(grad, true_grad)
            again, h_again = swiglu_backward_on_gpu(grad_h, gate_up, True, torch.empty_like(gate_up))
            assert torch.equal(again, grad) and torch.equal(h_again, h)
            turned = torch.empty(2 * width, rows, dtype=dtype).t()
            swiglu_backward_on_gpu(grad_h, gate_up, True, turned)
            assert torch.equal(turned, grad)
            same, h_again = swiglu_backward_on_gpu(grad_h, gate_up, True, gate_up)
            assert same is gate_up and torch.equal(gate_up, grad) and torch.equal(h_again, h)
        swiglu_triton._COLUMNS = 64  # after the first shape: a row takes two programs then
far = torch.tensor([[-200.0, 200.0, 3.0, 3.0]])
assert torch.equal(swiglu_operator(far), torch.tensor([[0.0, 600.0]]))
assert swiglu_operator(random(0, 8)).shape == (0, 4)
tests = ("test_schema", "test_faketensor")
for wanted in (False, True):
    torch.library.opcheck(swiglu_operator, (random(3, 8),), test_utils=tests)
    torch.library.opcheck(swiglu_backward_operator, (random(3, 4), random(3, 8), wanted), test_utils=tests)
    torch.library.opcheck(swiglu_backward_in_place_operator, (random(3, 4), random(3, 8), wanted), test_utils=tests)
    arguments = (random(3, 4), random(3, 8), wanted, random(3, 8))
    torch.library.opcheck(swiglu_backward_out_operator, arguments, test_utils=tests)
"""


def test_kernels_equal_the_reference_under_tritons_interpreter(check_interpreted: Callable[[str], None]) -> None:
    check_interpreted(KERNEL)
