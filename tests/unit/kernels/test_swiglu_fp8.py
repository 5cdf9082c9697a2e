"""SwiGLU that is quantised as it is made: the bits of both apart (test_fp8.py interprets the kernel)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tunesmith.kernels.fp8 import quantize_rows_fp8
from tunesmith.kernels.swiglu import swiglu
from tunesmith.kernels.swiglu_fp8 import swiglu_rows_fp8


def test_without_kernels_it_is_both_apart() -> None:
    gate_up = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    for mine, wanted in zip(swiglu_rows_fp8(gate_up), quantize_rows_fp8(swiglu(gate_up)), strict=True):
        assert torch.equal(mine.float(), wanted.float())


def test_a_row_stays_in_registers_on_hopper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen2.5-7B's width: nothing is read twice."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tunesmith.kernels.swiglu_fp8_triton import _rows_kernel as kernel

    if not hasattr(kernel, "cache_key"):
        pytest.skip("Triton interprets here (TRITON_INTERPRET): nothing is compiled")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    names = list(kernel.arg_names)
    types = {"gate_up": "*bf16", "codes": "*fp8e4nv", "scales": "*fp32", "stride": "i32"}
    constants = {"WIDTH": 18944, "COLUMNS": 4096, "INVERSE_LARGEST": 1 / 448, "SMALLEST": 1e-12}
    fixed = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in types}
    source = ASTSource(kernel, {name: types.get(name, "constexpr") for name in names}, fixed, aligned)
    options = {"num_warps": 8, "enable_fp_fusion": False}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    # Two loads of gate and two of up in each of five pieces.
    assert ptx.count("ld.global.v4") == 20
    assert ".local" not in ptx
