"""RMSNorm with fp8 codes: against quantising afterwards, and the kernel against the reference."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tunesmith.kernels.fp8 import quantize_rows_fp8
from tunesmith.kernels.norm_fp8 import rms_norm_fp8
from tunesmith.kernels.rms_norm import rms_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 48), (3, 96), (17, 200), (0, 16)])
def test_the_bits_of_quantising_afterwards(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(shape, generator=generator).to(dtype), torch.randn(shape[1], generator=generator)
    y, rstd, codes, scale = rms_norm_fp8(x, weight, 1e-5)
    true_y, true_rstd = rms_norm(x, weight, 1e-5)
    true_codes, true_scale = quantize_rows_fp8(true_y)
    assert torch.equal(y, true_y)
    assert torch.equal(rstd, true_rstd)
    assert torch.equal(codes.view(torch.uint8), true_codes.view(torch.uint8))
    assert torch.equal(scale, true_scale)


KERNEL = """
import torch
import triton
import triton.language as tl
from tunesmith.kernels import fp8

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
from tunesmith.kernels.fp8 import quantize_rows_reference
from tunesmith.kernels.norm_fp8_triton import rms_norm_fp8_operator
from tunesmith.kernels.rms_norm_triton import rms_norm_operator

generator = torch.Generator().manual_seed(0)
def random(*shape): return torch.randn(shape, generator=generator)
for rows, width in [(1, 48), (3, 3584), (17, 96), (50, 200), (2, 1)]:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        wide, weight = random(rows, width + 8).to(dtype), random(width)
        for x in (wide[:, 8:], wide[:, :-8].contiguous()):
            y, rstd, codes, scale = rms_norm_fp8_operator(x, weight, 1e-5)
            true_y, true_rstd = rms_norm_operator(x, weight, 1e-5)
            true_codes, true_scale = quantize_rows_reference(true_y)
            assert torch.equal(y, true_y) and torch.equal(rstd, true_rstd) and torch.equal(scale, true_scale)
            assert torch.equal(codes.view(torch.uint8), true_codes.view(torch.uint8))
zeros = rms_norm_fp8_operator(torch.zeros(3, 48), random(48), 1e-5)
assert torch.equal(zeros[3], quantize_rows_reference(zeros[0])[1])
assert rms_norm_fp8_operator(random(0, 48), random(48), 1e-5)[3].shape == (0, 1)
tests = ("test_schema", "test_faketensor")
torch.library.opcheck(rms_norm_fp8_operator, (random(5, 48), random(48), 1e-5), test_utils=tests)
"""


def test_the_kernel_equals_the_reference_under_tritons_interpreter(tmp_path: Path) -> None:
    """In its own process: the interpreter is chosen when Triton is imported."""
    pytest.importorskip("triton")
    script = tmp_path / "check.py"  # Triton reads its kernels' source
    script.write_text(KERNEL, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-2000:]
