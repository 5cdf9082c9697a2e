"""Inner products of columns: against float64, and the kernel against the reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tunesmith.kernels.column_dot import column_dot


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 48), (3, 96), (17, 200), (0, 5)])
def test_equals_the_sum_in_float64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    found = column_dot(left, right)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), (left.double() * right.double()).sum(0), rtol=1e-5, atol=1e-5)


KERNEL = """
import torch
from tunesmith.kernels.column_dot import column_dot_reference
from tunesmith.kernels import column_dot_triton
from tunesmith.kernels.column_dot_triton import column_dot_operator

generator = torch.Generator().manual_seed(0)
shapes = [(513, 260), (1, 1), (3, 12), (17, 16), (33, 7), (72, 35)]
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for rows, width in shapes if dtype == torch.float32 else shapes[4:]:
        left = torch.randn(rows, width + 5, generator=generator).to(dtype)[:, 2 : width + 2]
        right = torch.randn(rows, width, generator=generator).to(dtype)
        found, truth = column_dot_operator(left, right), column_dot_reference(left, right)
        torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-4)
        # After the first shape: 32 rows of 16 columns a program, four at once.
        column_dot_triton._COLUMNS, column_dot_triton._TILE_ROWS, column_dot_triton._ROWS = 16, 4, 32
assert column_dot_operator(left[:0], right[:0]).tolist() == [0.0] * 35
torch.library.opcheck(column_dot_operator, (left, right), test_utils=("test_schema", "test_faketensor"))
"""


def test_kernel_equals_the_reference_under_tritons_interpreter(check_interpreted: Callable[[str], None]) -> None:
    check_interpreted(KERNEL)


@pytest.mark.parametrize("chip", [80, 86, 89, 90, 100, 120])
def test_compiles_for_every_chip(chip: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tunesmith.kernels.column_dot_triton import _column_dot_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    if not hasattr(_column_dot_kernel, "cache_key"):
        pytest.skip("Triton interprets here (TRITON_INTERPRET): nothing is compiled")
    types = {"left": "*bf16", "right": "*bf16", "partial": "*fp32"}
    types |= dict.fromkeys(("num_rows", "left_stride", "right_stride"), "i32")
    constants = {"WIDTH": 37888, "COLUMNS": 256, "TILE_ROWS": 16, "ROWS": 512}
    names = list(_column_dot_kernel.arg_names)
    source = ASTSource(
        _column_dot_kernel,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in types if name != "num_rows"},
    )
    options = {"num_warps": 4, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    assert f".target sm_{chip}" in compiled.asm["ptx"]
    assert "ld.global.v4.b32" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 48 * 1024
