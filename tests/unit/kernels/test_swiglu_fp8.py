"""SwiGLU with fp8 codes: against quantising afterwards, and the kernels against the reference."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tunesmith.kernels import swiglu as swiglu_module
from tunesmith.kernels import swiglu_low_rank as low_rank_module
from tunesmith.kernels.fp8 import FP8, SMALLEST_SCALE, quantize_rows_fp8
from tunesmith.kernels.swiglu_fp8 import swiglu_fp8, swiglu_fp8_backward
from tunesmith.kernels.swiglu_low_rank import swiglu_low_rank, swiglu_low_rank_backward


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(mine: Tensor, truth: Tensor) -> bool:
    return torch.equal(mine.view(torch.uint8), truth.view(torch.uint8))


@pytest.fixture(autouse=True)
def _by_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 a CPU goes a shorter way with other bits; these tests are about the bits of the references."""
    for module in (swiglu_module, low_rank_module):
        monkeypatch.setattr(module, "in_float32_on_cpu", lambda *_: False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapted", [True, False])
def test_the_bits_of_quantising_afterwards(dtype: torch.dtype, adapted: bool) -> None:
    gate_up, grad_h = random(5, 96, dtype=dtype), random(5, 48, dtype=dtype, seed=1)
    low, up = (random(5, 4, dtype=dtype), random(96, 4, dtype=dtype)) if adapted else (None, None)
    dlow, down = (random(5, 2, dtype=dtype), random(2, 48, dtype=dtype)) if adapted else (None, None)
    factors = (low, up, dlow, down)
    h, codes, scale = swiglu_fp8(gate_up, low, up)
    assert torch.equal(h, swiglu_low_rank(gate_up, low, up))
    true_codes, true_scale = quantize_rows_fp8(h)
    assert same(codes, true_codes)
    assert torch.equal(scale, true_scale)
    for fold in (None, random(96).abs()):
        grad, again, codes, scale = swiglu_fp8_backward(grad_h, gate_up, *factors, True, fold)
        true_grad, _ = swiglu_low_rank_backward(grad_h, gate_up, *factors, False)
        true_codes, true_scale = quantize_rows_fp8(true_grad, fold)
        assert torch.equal(grad, true_grad)
        assert again is not None
        assert torch.equal(again, h)
        assert same(codes, true_codes)
        assert torch.equal(scale, true_scale)
        held = gate_up.clone()
        out, none, codes, _ = swiglu_fp8_backward(grad_h, held, *factors, False, fold, held)
        assert none is None
        assert out is held
        assert torch.equal(held, grad)
        assert same(codes, true_codes)


def test_rows_of_zeros_and_no_rows() -> None:
    _, codes, scale = swiglu_fp8(torch.zeros(2, 32), None, None)
    assert scale.eq(SMALLEST_SCALE).all()
    assert codes.float().eq(0).all()
    h, codes, scale = swiglu_fp8(torch.zeros(0, 32), None, None)
    assert (h.shape, codes.shape, codes.dtype, scale.shape) == ((0, 16), (0, 16), FP8, (0, 1))


KERNELS = """
import torch
import triton
import triton.language as tl
from tunesmith.kernels import fp8, swiglu_fp8_triton, swiglu_low_rank_triton

@triton.jit
def cast(values, codes, count, SIZE: tl.constexpr):
    index = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    value = tl.load(values + index, mask=index < count)
    tl.store(codes + index, value.to(tl.float8e4nv), mask=index < count)

def to_codes_interpreted(wide, scale):
    '''The interpreter's conversion to fp8 loses the carry of a rounding: the truth is converted by it too.'''
    values = (wide * (1.0 / scale)).clamp(-448, 448).contiguous()
    codes = torch.empty(values.shape, dtype=torch.float8_e4m3fn)
    cast[(triton.cdiv(values.numel(), 1024),)](values, codes, values.numel(), SIZE=1024)
    return codes

fp8.to_codes = to_codes_interpreted
cast_factors = swiglu_low_rank_triton.factors
def factors(left, right, like):
    # The interpreter multiplies the codes of bfloat16, not its values: the same factors, held in float32.
    return cast_factors(left, right, like.float() if like.dtype == torch.bfloat16 else like)
swiglu_low_rank_triton.factors = swiglu_fp8_triton.factors = factors

from tunesmith.kernels.fp8 import quantize_rows_reference
from tunesmith.kernels.swiglu_fp8_triton import (
    swiglu_fp8_backward_in_place_operator, swiglu_fp8_backward_on_gpu, swiglu_fp8_backward_out_operator,
    swiglu_fp8_operator)
from tunesmith.kernels.swiglu_low_rank_triton import (
    swiglu_low_rank_backward_on_gpu, swiglu_low_rank_operator)
from tunesmith.kernels.swiglu_triton import swiglu_operator

generator = torch.Generator().manual_seed(0)
def random(*shape): return torch.randn(shape, generator=generator)
def check(codes, scale, value, fold=None):
    expected, expected_scale = quantize_rows_reference(value, fold)
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8)) and torch.equal(scale, expected_scale)
swiglu_fp8_triton._PROGRAMS_PER_PROCESSOR = BEHIND
for rows, width, rank, other, dtype in SHAPES:
    gate_up, fold = random(rows, 2 * width + 8).to(dtype)[:, 8:], random(2 * width)
    grad_h = random(rows, width).to(dtype)
    pair = (random(rows, rank).to(dtype), random(2 * width, rank).to(dtype)) if rank else (None, None)
    rest = (random(rows, other).to(dtype), random(other, width).to(dtype)) if other else (None, None)
    h, codes, scale = swiglu_fp8_operator(gate_up, *pair)
    assert torch.equal(h, swiglu_low_rank_operator(gate_up, *pair) if rank else swiglu_operator(gate_up))
    check(codes, scale, h)
    arguments = (grad_h, gate_up, *pair, *rest)
    expected, h = swiglu_low_rank_backward_on_gpu(*arguments, True, None)
    grad, h_again, codes, scale = swiglu_fp8_backward_on_gpu(*arguments, True, fold, None)
    assert torch.equal(grad, expected) and torch.equal(h_again, h)
    check(codes, scale, grad, fold)
    turned = torch.empty(2 * width, rows, dtype=dtype).t()
    swiglu_fp8_backward_on_gpu(*arguments, False, None, turned)
    assert torch.equal(turned, grad)
    same, none, codes, scale = swiglu_fp8_backward_on_gpu(*arguments, False, None, gate_up)
    assert same is gate_up and none is None and torch.equal(gate_up, grad)
    check(codes, scale, grad)
_, codes, scale = swiglu_fp8_operator(torch.zeros(2, 32), None, None)
check(codes, scale, torch.zeros(2, 16))
assert swiglu_fp8_operator(torch.empty(0, 32), None, None)[1].shape == (0, 16)
checks = ("test_schema", "test_faketensor")
low, up, dlow, down, fold = random(3, 2), random(8, 2), random(3, 5), random(5, 4), random(8)
torch.library.opcheck(swiglu_fp8_operator, (random(3, 8), low, up), test_utils=checks)
for arguments in [(low, up, dlow, down, True, fold), (None, None, None, None, False, None)]:
    arguments = (random(3, 4), random(3, 8), *arguments)
    torch.library.opcheck(swiglu_fp8_backward_in_place_operator, arguments, test_utils=checks)
    torch.library.opcheck(swiglu_fp8_backward_out_operator, (*arguments, random(3, 8)), test_utils=checks)
"""
SHAPES = [
    (1, 48, 32, 16, torch.float32),
    (3, 200, 7, 0, torch.bfloat16),
    (130, 80, 0, 3, torch.float16),
    (259, 16, 2, 2, torch.bfloat16),
]


@pytest.mark.parametrize(("shapes", "behind"), [(SHAPES[:2], 3), (SHAPES[2:], 3), (SHAPES[3:], 20)])
def test_kernels_equal_the_reference_under_tritons_interpreter(
    shapes: list[tuple[int, int, int, int, torch.dtype]], behind: int, tmp_path: Path
) -> None:
    """In its own process: the interpreter is chosen when Triton is imported."""
    pytest.importorskip("triton")
    script = tmp_path / "check.py"  # Triton reads its kernels' source
    script.write_text(KERNELS.replace("SHAPES", repr(shapes)).replace("BEHIND", str(behind)), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-2000:]
