"""fp8 products in parts: how they are cut, and what Hopper makes of them (test_gemv.py interprets the kernels)."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_parts_fill_the_chip_once() -> None:
    """Qwen2.5-7B on 132 processors: gate and up fill it alone; a width that is not in steps is left alone."""
    from tunesmith.kernels.fp8_split_triton import num_parts

    shapes = ((4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944))
    assert [num_parts(64, *shape, 132) for shape in shapes] == [3, 4, 1, 4]
    assert [num_parts(256, *shape, 132) for shape in shapes] == [1, 1, 1, 2]
    assert [num_parts(192, *shape, 132) for shape in shapes] == [1, 1, 1, 1]
    assert num_parts(64, 3584, 900, 132) == 1


def test_hopper_multiplies_it_by_its_own_products_in_fp8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tunesmith.kernels.fp8_split_triton import ROWS, STEP, TOKENS, _part_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    if not hasattr(_part_kernel, "cache_key"):
        pytest.skip("Triton interprets here (TRITON_INTERPRET): nothing is compiled")
    names = list(_part_kernel.arg_names)
    types = {"x": "*fp8e4nv", "w": "*fp8e4nv", "sums": "*fp32", "num_tokens": "i32", "num_rows": "i32"}
    types["of_part"] = "i32"
    constants = {"WIDTH": 18944, "TOKENS": TOKENS, "ROWS": ROWS, "STEP": STEP}
    fixed = {(names.index(name),): value for name, value in constants.items()}
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]] for name in types if name not in ("num_tokens", "of_part")
    }
    source = ASTSource(_part_kernel, {name: types.get(name, "constexpr") for name in names}, fixed, aligned)
    options = {"num_warps": 8, "num_stages": 4, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3" in compiled.asm["ptx"]
    assert "cp.async" in compiled.asm["ptx"]
    assert compiled.metadata.shared < 227 * 1024
