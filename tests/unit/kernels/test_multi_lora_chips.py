"""The kernels of adapters of many requests compile for every chip that can run them, without a GPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
CHIPS = (80, 86, 89, 90, 100, 120)
# What a block gets on every chip without asking for more; the wide tile's operands are staged through it.
SHARED_BYTES = 99 * 1024
COMMON = {"PARTS": 3, "RANK": 16, "PADDED": 16}
WIDE_RANK = {"PARTS": 2, "RANK": 64, "PADDED": 64}


def kernels() -> dict[str, tuple[Any, dict[str, str], dict[str, int]]]:
    """Every kernel with its arguments' types and its constants."""
    from tunesmith.kernels import multi_lora_triton as lora
    from tunesmith.kernels.multi_lora_tiles import BAND, TILE, WIDE_TILE

    stream, index, count = "*bf16", "*i32", "i32"
    tables = {"ranks": index, "order": index, "tiles": index, "low": "*fp32", "num_rows": count, "stride": count}
    shrink = {"x": stream, "down": stream, **tables}
    expand = {"y": stream, "up": stream, "bands": index, "num_columns": count, **tables}
    depth = {"WIDTH": 3584, "DEPTH": lora.DEPTH}
    return {
        "shrink": (lora._shrink_kernel, shrink, {**depth, "CHUNKS": 7, "TILE": TILE, **COMMON}),
        "shrink_wide": (lora._shrink_kernel, shrink, {**depth, "CHUNKS": 1, "TILE": WIDE_TILE, **WIDE_RANK}),
        "expand": (lora._expand_kernel, expand, {"BAND": BAND, "CHUNKS": 7, "TILE": TILE, **COMMON}),
        "expand_wide": (lora._expand_kernel, expand, {"BAND": BAND, "CHUNKS": 1, "TILE": WIDE_TILE, **WIDE_RANK}),
    }


def _long(name: str, chips: tuple[int, ...]) -> Any:
    return pytest.param(name, chips, marks=pytest.mark.long)


@pytest.mark.parametrize(
    ("name", "chips"),
    [
        ("shrink", (80, 120)),
        ("expand", (80, 90)),
        *(_long(name, CHIPS) for name in ("shrink", "shrink_wide", "expand", "expand_wide")),
    ],
)
def test_compiles_for_every_chip(
    name: str, chips: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tunesmith.kernels.multi_lora_triton import WARPS

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, types, constants = kernels()[name]
    if not hasattr(kernel, "cache_key"):
        pytest.skip("Triton interprets here (TRITON_INTERPRET): nothing is compiled")
    names = list(kernel.arg_names)
    signature = {argument: types.get(argument, "constexpr") for argument in names}
    aligned = [argument for argument in types if argument != "num_rows"]
    attributes = {(names.index(argument),): [["tt.divisibility", 16]] for argument in aligned}
    fixed = {(names.index(argument),): value for argument, value in constants.items()}
    options = {"num_warps": WARPS, "enable_fp_fusion": False}
    for chip in chips:
        source = ASTSource(kernel, signature, fixed, attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
        ptx = compiled.asm["ptx"]
        assert f".target sm_{chip}" in ptx
        assert compiled.metadata.shared <= SHARED_BYTES, (chip, compiled.metadata.shared)
        assert re.search(r"wgmma|mma\.sync|tcgen05\.mma", ptx), chip
        if name.startswith("shrink"):  # the adapters come sixteen bytes at a time
            assert "v4.b32" in ptx or "cp.async.cg" in ptx or "cp.async.ca" in ptx, chip
