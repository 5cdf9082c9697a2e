"""SwiGLU with the adapters' sums: against autograd over sums made beforehand, and the kernels against the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.kernels.swiglu import swiglu, swiglu_backward
from tunesmith.kernels.swiglu_low_rank import swiglu_low_rank, swiglu_low_rank_backward

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(rows: int, width: int, rank: int, other: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """grad_h, gate_up, low, up, dlow, down."""
    shapes = [(rows, width), (rows, 2 * width), (rows, rank), (2 * width, rank), (rows, other), (other, width)]
    return [random(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]


@pytest.mark.parametrize(("rows", "width", "rank", "other"), [(1, 48, 1, 3), (3, 96, 32, 16), (17, 200, 7, 100)])
def test_forward_and_backward_equal_autograd(rows: int, width: int, rank: int, other: int) -> None:
    grad_h, gate_up, low, up, dlow, down = inputs(rows, width, rank, other)
    whole = (gate_up.double() + low.double() @ up.double().t()).requires_grad_()
    gate, value = whole.chunk(2, dim=-1)
    expected = F.silu(gate) * value
    expected.backward(grad_h.double() + dlow.double() @ down.double())
    h = swiglu_low_rank(gate_up, low, up)
    torch.testing.assert_close(h.double(), expected.detach(), rtol=1e-4, atol=1e-4)
    grad, again = swiglu_low_rank_backward(grad_h, gate_up, low, up, dlow, down, True)
    torch.testing.assert_close(grad.double(), whole.grad, rtol=1e-4, atol=1e-3)
    assert again is not None
    assert torch.equal(again, h)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_adapters_the_bits_of_swiglu(dtype: torch.dtype) -> None:
    grad_h, gate_up, *_ = inputs(5, 48, 2, 2, dtype)
    assert torch.equal(swiglu_low_rank(gate_up, None, None), swiglu(gate_up))
    mine = swiglu_low_rank_backward(grad_h, gate_up, None, None, None, None, True)
    for one, other in zip(mine, swiglu_backward(grad_h, gate_up, True), strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_gives_the_same_bits_and_either_side_can_be_missing(dtype: torch.dtype) -> None:
    grad_h, gate_up, low, up, dlow, down = inputs(5, 48, 4, 2, dtype)
    zero = torch.zeros_like
    for first, second in [(True, True), (True, False), (False, True)]:
        left, right = (low, up) if first else (None, None)
        grad_left, grad_right = (dlow, down) if second else (None, None)
        factors = (left, right, grad_left, grad_right)
        held = gate_up.clone()
        grad, h = swiglu_low_rank_backward(grad_h, held, *factors, want_h=False)
        assert h is None
        same, _ = swiglu_low_rank_backward(grad_h, held, *factors, want_h=True, out=held)
        assert same is held
        assert torch.equal(held, grad)
        zeros = (low if first else zero(low), up, dlow if second else zero(dlow), down)
        assert torch.equal(swiglu_low_rank_backward(grad_h, gate_up, *zeros, False)[0], grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sums_are_not_rounded(dtype: torch.dtype) -> None:
    """A sum of half a unit of gate's last place: added to the activation it would be lost, to the even neighbour."""
    unit = torch.finfo(dtype).eps
    gate_up = torch.ones(1, 16, dtype=dtype)
    up = torch.cat((torch.full((8, 1), unit / 2), torch.zeros(8, 1))).to(dtype)
    h = swiglu_low_rank(gate_up.float(), torch.ones(1, 1), up.float())
    assert torch.equal(swiglu_low_rank(gate_up, torch.ones(1, 1, dtype=dtype), up), h.to(dtype))
    gate_up[:, 8:] = 128 / 0.731
    rounded = swiglu(gate_up)
    assert not torch.equal(swiglu_low_rank(gate_up, torch.ones(1, 1, dtype=dtype), up * 1.5), rounded)


KERNEL = """
import torch
from tunesmith.kernels.swiglu_low_rank import swiglu_low_rank_backward_reference, swiglu_low_rank_reference
from tunesmith.kernels.swiglu_low_rank_triton import (
    swiglu_low_rank_backward_in_place_operator, swiglu_low_rank_backward_on_gpu, swiglu_low_rank_backward_operator,
    swiglu_low_rank_backward_out_operator, swiglu_low_rank_operator)
from tunesmith.kernels import swiglu_low_rank_triton as kernels

cast_factors = kernels.factors
def factors(left, right, like):
    # The interpreter multiplies the codes of bfloat16, not its values: the same factors, held in float32.
    return cast_factors(left, right, like.float() if like.dtype == torch.bfloat16 else like)
kernels.factors = factors

generator = torch.Generator().manual_seed(0)
def random(*shape): return torch.randn(shape, generator=generator)
# The interpreter cuts bfloat16 off where a GPU rounds it.
tolerance = {torch.float32: 1e-5, torch.float16: 2**-8, torch.bfloat16: 2**-6}
# Smaller tiles, two of them below each other: 32 rows of a program.
tiles = {"ROWS": 16, "BACKWARD_ROWS": 16, "STEPS": 2, "BACKWARD_STEPS": 2, "COLUMNS": 16}
shapes = [(70, 48, 5, 3), (1, 40, 32, 16), (50, 20, 20, 33), (3, 40, 1, 33), (2, 1, 3, 3)]
for dtype, limit in tolerance.items():
    def close(mine, truth):
        assert mine.dtype == truth.dtype == dtype and mine.shape == truth.shape
        torch.testing.assert_close(mine, truth, rtol=limit, atol=limit)
    for rows, width, rank, other in shapes if dtype == torch.float32 else [(50, 24, 64, 100)]:
        wide, grad_h = random(rows, 2 * width + 8).to(dtype), random(rows, width + 3).to(dtype)[:, 3:]
        low, up = random(rows, rank).to(dtype), (random(rank, 2 * width) / rank).to(dtype).t()
        dlow, down = random(rows, other).to(dtype), (random(other, width) / other).to(dtype)
        for gate_up in (wide[:, 8:],) if width != 20 else (wide[:, :-8].contiguous(), wide[:, 8:]):
            h = swiglu_low_rank_operator(gate_up, low, up)
            close(h, swiglu_low_rank_reference(gate_up, low, up))
            sides = [((low, up), (dlow, down)), ((low, up), (None, None)), ((None, None), (dlow, down))]
            for pair, rest in sides if width == 20 and not gate_up.is_contiguous() else sides[:1]:
                arguments = (grad_h, gate_up, *pair, *rest)
                truth, _ = swiglu_low_rank_backward_reference(*arguments, False)
                grad, none = swiglu_low_rank_backward_on_gpu(*arguments, False, None)
                assert none is None
                close(grad, truth)
                again, h_again = swiglu_low_rank_backward_on_gpu(*arguments, True, torch.empty_like(gate_up))
                assert torch.equal(again, grad) and (pair[0] is None or torch.equal(h_again, h))
            turned = torch.empty(2 * width, rows, dtype=dtype).t()
            swiglu_low_rank_backward_on_gpu(*arguments, True, turned)
            assert torch.equal(turned, grad)
            same, h_again = swiglu_low_rank_backward_on_gpu(*arguments, True, gate_up)
            assert same is gate_up and torch.equal(gate_up, grad)
        vars(kernels).update(tiles)  # after the first shape
assert swiglu_low_rank_operator(random(0, 8), random(0, 2), random(8, 2)).shape == (0, 4)
tests = ("test_schema", "test_faketensor")
low, up, dlow, down = random(3, 2), random(8, 2), random(3, 5), random(5, 4)
torch.library.opcheck(swiglu_low_rank_operator, (random(3, 8), low, up), test_utils=tests)
for arguments in [(low, up, dlow, down, True), (low, up, None, None, False), (None, None, dlow, down, True)]:
    arguments = (random(3, 4), random(3, 8), *arguments)
    torch.library.opcheck(swiglu_low_rank_backward_operator, arguments, test_utils=tests)
    torch.library.opcheck(swiglu_low_rank_backward_in_place_operator, arguments, test_utils=tests)
    torch.library.opcheck(swiglu_low_rank_backward_out_operator, (*arguments, random(3, 8)), test_utils=tests)
"""


def test_kernels_equal_the_reference_under_tritons_interpreter(check_interpreted: Callable[[str], None]) -> None:
    check_interpreted(KERNEL)
