"""Kernels that write fp8, under Triton's CPU interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

FP8_AS_INTERPRETED = """
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

fp8.to_codes = to_codes_interpreted  # before the modules that take it over
"""


@pytest.fixture
def check_interpreted_fp8(tmp_path: Path) -> Callable[[str], None]:
    """Runs a script whose references round to fp8 as the interpreter does; fails where an assertion in it does.

    In its own process: the interpreter is chosen when Triton is imported.
    """
    pytest.importorskip("triton")

    def check(source: str) -> None:
        script = tmp_path / "check.py"  # Triton reads its kernels' source
        script.write_text(FP8_AS_INTERPRETED + source, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, str(script)],
            env={**os.environ, "TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
            timeout=250,
        )
        assert done.returncode == 0, done.stderr[-2000:]

    return check
