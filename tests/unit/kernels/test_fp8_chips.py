"""The kernels of fp8 compile, without a GPU, for exactly the chips that have fp8, within each chip's shared memory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tunesmith.hardware import GENERATIONS

triton = pytest.importorskip("triton")
CHIPS = {10 * major + minor: generation for (major, minor), generation in GENERATIONS.items() if major >= 8}
WRITING_FP8 = ["quantize_rows", "quantize_long_rows", "quantize_columns", "nf4_to_fp8", "nf4_to_fp8_transposed"]


def kernels() -> dict[str, tuple[Any, dict[str, str], dict[str, Any], int]]:
    """Every kernel with its arguments' types (integers multiples of 16, as real sizes), its constants and its warps."""
    from tunesmith.kernels import fp8_columns_triton as columns
    from tunesmith.kernels import fp8_triton as rows
    from tunesmith.kernels import nf4_fp8_triton as nf4

    edge: dict[str, Any] = {"INVERSE_LARGEST": 1 / 448, "SMALLEST": 2.0**-100}
    quantise = {"x": "*bf16", "fold": "*fp32", "codes": "*fp8e4nv", "scales": "*fp32", "stride": "i32", "width": "i32"}
    sizes = {"num_rows": "i32", "width": "i32", "stride": "i32"}
    largest_tile = dict(zip(("ROWS", "COLUMNS"), columns.LARGEST_TILE, strict=True))
    codes_tile = dict(zip(("ROWS", "COLUMNS"), columns.CODES_TILE, strict=True))
    turned = {**sizes, "x": "*bf16", "largest": "*i32", "codes": "*fp8e4nv", "scales": "*fp32", "num_padded": "i32"}
    blocks = {"BLOCK": nf4.BLOCK, "SCALE_BLOCK": nf4.SCALE_BLOCK, "ROWS": nf4.ROWS, "BLOCKS": nf4.BLOCKS, "DOUBLE": 1}
    packed = {"codes": "*u8", "scales": "*u8", "scale_scales": "*fp32", "offset": "*fp32", "table": "*fp32"}
    packed |= {"dynamic": "*fp32", "row_scales": "*fp32", "out": "*fp8e4nv"}
    packed |= dict.fromkeys(("first_row", "num_rows", "width", "out_stride"), "i32")
    row = rows._quantize_rows_kernel
    return {
        "quantize_rows": (row, quantise, {"FOLD": 1, "WHOLE": 1, "COLUMNS": 4096, **edge}, 4),
        "quantize_long_rows": (row, quantise, {"FOLD": 0, "WHOLE": 0, "COLUMNS": rows.WIDEST, **edge}, 8),
        "transpose": (rows._transpose_kernel, {"codes": "*u8", "out": "*u8", **sizes}, {"TILE": rows.TILE}, 4),
        "largest": (columns._largest_kernel, {**sizes, "x": "*bf16", "largest": "*i32"}, largest_tile, 4),
        "quantize_columns": (columns._codes_kernel, turned, {**codes_tile, **edge}, 4),
        "nf4_to_fp8": (nf4._nf4_to_fp8_kernel, packed, {**blocks, "TRANSPOSED": 0}, 4),
        "nf4_to_fp8_transposed": (nf4._nf4_to_fp8_kernel, packed, {**blocks, "TRANSPOSED": 1}, 4),
    }


@pytest.mark.parametrize("name", [*WRITING_FP8, "transpose", "largest"])
def test_compiles_where_the_chip_has_fp8(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, CompilationError

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, types, constants, warps = kernels()[name]
    if not hasattr(kernel, "cache_key"):
        pytest.skip("Triton interprets here (TRITON_INTERPRET): nothing is compiled")
    names = list(kernel.arg_names)
    signature = {argument: types.get(argument, "constexpr") for argument in names}
    fixed = {(names.index(argument),): value for argument, value in constants.items()}
    aligned = {(names.index(argument),): [["tt.divisibility", 16]] for argument in types}
    options = {"num_warps": warps, "enable_fp_fusion": False}
    for chip, generation in CHIPS.items():
        source, target = ASTSource(kernel, signature, fixed, aligned), GPUTarget("cuda", chip, 32)
        if name in WRITING_FP8 and not generation.has_fp8:
            with pytest.raises(CompilationError, match="fp8e4nv not supported"):
                triton.compile(source, target=target, options=options)
            continue
        compiled = triton.compile(source, target=target, options=options)
        assert f".target sm_{chip}" in compiled.asm["ptx"]
        assert compiled.metadata.shared <= generation.shared_bytes
        if name in ("transpose", "nf4_to_fp8", "nf4_to_fp8_transposed"):
            # Codes are read and written sixteen bytes at a time, transposed or not; tables and scales are single.
            stores = re.findall(r"st\.global\S*\.[bf]\d+", compiled.asm["ptx"])
            assert stores and all("v4.b32" in store for store in stores), (chip, stores)
            assert re.search(r"ld\.global\S*\.v4\.b32", compiled.asm["ptx"])
