"""SwiGLU's gradient with the adapters' gradients: against autograd, against products of their own, and the kernel."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.kernels import swiglu as swiglu_module
from tunesmith.kernels import swiglu_low_rank as low_rank_module
from tunesmith.kernels.swiglu_low_rank import swiglu_low_rank, swiglu_low_rank_backward
from tunesmith.kernels.swiglu_low_rank_grads import WIDEST_RANK, can_sum_grads, swiglu_low_rank_grads


def inputs(rows: int, width: int, rank: int, other: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """grad_h, gate_up, low, up, dlow, down."""
    shapes = [(rows, width), (rows, 2 * width), (rows, rank), (2 * width, rank), (rows, other), (other, width)]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.fixture(autouse=True)
def _by_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 a CPU goes a shorter way with other bits; these tests are about the bits of the references."""
    for module in (swiglu_module, low_rank_module):
        monkeypatch.setattr(module, "in_float32_on_cpu", lambda *_: False)


@pytest.mark.parametrize("sizes", [(1, 48, 1, 3), (3, 96, 32, 16), (17, 200, 7, 64)])
def test_the_gradients_are_autograds(sizes: tuple[int, int, int, int]) -> None:
    grad_h, gate_up, low, up, dlow, down = inputs(*sizes)
    factor = up.double().requires_grad_()
    whole = gate_up.double() + low.double() @ factor.t()
    whole.retain_grad()
    gate, value = whole.chunk(2, dim=-1)
    h = F.silu(gate) * value
    h.backward(grad_h.double() + dlow.double() @ down.double())
    of_up, of_down = swiglu_low_rank_grads(grad_h, gate_up, low, up, dlow, down)
    assert whole.grad is not None
    assert factor.grad is not None
    torch.testing.assert_close(gate_up.double(), whole.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(of_up.double(), factor.grad, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(of_down.double(), dlow.double().t() @ h.detach(), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_launches_of_their_own_make(dtype: torch.dtype) -> None:
    grad_h, gate_up, *factors = inputs(19, 48, 8, 4, dtype)
    low, _, dlow, _ = factors
    h = swiglu_low_rank(gate_up, low, factors[1])
    grad, _ = swiglu_low_rank_backward(grad_h, gate_up, *factors, want_h=False)
    of_up, of_down = swiglu_low_rank_grads(grad_h, gate_up, *factors)
    assert of_up.dtype == of_down.dtype == torch.float32
    assert torch.equal(gate_up, grad)
    assert torch.equal(of_up, grad.float().t() @ low.float())
    assert torch.equal(of_down, dlow.float().t() @ h.float())


def test_ranks_that_do_not_fit_and_missing_factors_are_refused() -> None:
    grad_h, gate_up, low, up, dlow, down = inputs(3, 16, WIDEST_RANK + 1, 4)
    assert not can_sum_grads((low, up), (dlow, down))
    assert not can_sum_grads((None, None), (dlow, down))
    assert can_sum_grads((low[:, 1:], up[:, 1:]), (dlow, down))
    with pytest.raises(ValueError, match="ranks from 1 to 64, got"):
        swiglu_low_rank_grads(grad_h, gate_up, low, up, dlow, down)
    with pytest.raises(ValueError, match="needs the factors of both"):
        swiglu_low_rank_grads(grad_h, gate_up, low, up, None, None)


KERNEL = """
import torch
from tunesmith.kernels.swiglu_low_rank_grads import swiglu_low_rank_grads_reference
from tunesmith.kernels import swiglu_low_rank_grads_triton as kernels

cast_factors = kernels.factors
def factors(left, right, like):
    # The interpreter multiplies the codes of bfloat16, not its values: the same factors, held in float32.
    return cast_factors(left, right, like.float() if like.dtype == torch.bfloat16 else like)
kernels.factors = factors
kernels.ROWS, kernels.COLUMNS, kernels.STEPS = 16, 16, 3  # ranges of 48 tokens

generator = torch.Generator().manual_seed(0)
def random(*shape): return torch.randn(shape, generator=generator)
# The interpreter cuts bfloat16 off where a GPU rounds it.
tolerance = {torch.float32: 1e-5, torch.float16: 2**-8, torch.bfloat16: 2**-5}
shapes = [(1, 16, 32, 16), (17, 40, 64, 3), (100, 24, 5, 33), (49, 50, 1, 16)]
for dtype, limit in tolerance.items():
    for rows, width, rank, other in shapes if dtype == torch.float32 else shapes[2:3]:
        wide, grad_h = random(rows, 2 * width + 8).to(dtype), random(rows, width + 3).to(dtype)[:, 3:]
        low, up = random(rows, rank).to(dtype), (random(rank, 2 * width) / rank).to(dtype).t()
        dlow, down = random(rows, other).to(dtype), (random(other, width) / other).to(dtype)
        turned = wide[:, 8:].t().contiguous().t()
        for gate_up in (wide[:, 8:], turned) if width == 24 else (wide[:, 8:],):
            truth = gate_up.clone()
            expected = swiglu_low_rank_grads_reference(grad_h, truth, low, up, dlow, down)
            before = wide[:, :8].clone()
            found = kernels.swiglu_low_rank_grads_operator(grad_h, gate_up, low, up, dlow, down)
            torch.testing.assert_close(gate_up, truth, rtol=limit, atol=limit)
            assert torch.equal(wide[:, :8], before)
            for mine, theirs in zip(found, expected):
                assert mine.shape == theirs.shape and mine.dtype == torch.float32
                torch.testing.assert_close(mine, theirs, rtol=limit, atol=limit * max(1, rows**0.5))
empty = kernels.swiglu_low_rank_grads_operator(
    random(0, 4), random(0, 8), random(0, 2), random(8, 2), random(0, 3), random(3, 4))
assert [tuple(sums.shape) for sums in empty] == [(8, 2), (3, 4)] and not any(sums.any() for sums in empty)
arguments = (random(3, 4), random(3, 8), random(3, 2), random(8, 2), random(3, 5), random(5, 4))
torch.library.opcheck(
    kernels.swiglu_low_rank_grads_operator, arguments, test_utils=("test_schema", "test_faketensor"))
"""


def test_the_kernel_equals_the_reference_under_tritons_interpreter(check_interpreted: Callable[[str], None]) -> None:
    check_interpreted(KERNEL)
