"""The kernel of int4's products by bytes compiles for every chip, and asks for weights before it waits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tunesmith.hardware import GENERATIONS

triton = pytest.importorskip("triton")
CHIPS = {10 * major + minor: generation for (major, minor), generation in GENERATIONS.items() if major >= 8}
# Parts, tiles, zero points, scales in float16, warps, steps ahead.
FORMS = [(1, 1, 1, 0, 1, 2), (1, 2, 0, 1, 8, 1), (2, 1, 1, 1, 8, 2), (2, 2, 0, 0, 2, 1), (4, 1, 1, 0, 1, 2)]
FORMS += [(4, 4, 1, 0, 4, 1)]
QUICK = [(FORMS[0], 90), (FORMS[0], 80), (FORMS[4], 90), (FORMS[1], 120)]
OTHERS = [pytest.param(f, c, marks=pytest.mark.long) for f in FORMS for c in CHIPS if (f, c) not in QUICK]


@pytest.mark.parametrize(("form", "chip"), [*QUICK, *OTHERS])
def test_compiles_for_every_chip(
    form: tuple[int, ...], chip: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tunesmith.kernels.gemv_quads_triton import stays_in_threads
    from tunesmith.kernels.int4_bytes_triton import bytes_kernel as kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    if not hasattr(kernel, "cache_key"):
        pytest.skip("Triton interprets here (TRITON_INTERPRET): nothing is compiled")
    parts, tiles, zeros, half, warps, ahead = form
    constants: dict[str, Any] = {"WIDTH": 3584, "PARTS": parts, "ZEROS": zeros, "BIAS": 1, "SCALE_HALF": half}
    constants |= {"EVEN_ROWS": warps > 1, "TILES": tiles, "WARPS": warps, "AHEAD": ahead, "BY_HAND": 1}
    constants["OVERLAP"] = int(chip >= 90)
    types = {"x": "*i32", "w": "*i32", "bias": "*bf16", "out": "*bf16", "num_rows": "i32", "num_tokens": "i32"}
    types |= {"scales": "*i32", "zeros": "*i16"} if parts == 1 else {"scales": "*i16", "zeros": "*u8"}
    names = list(kernel.arg_names)
    fixed = {(names.index(argument),): value for argument, value in constants.items()}
    aligned = {(names.index(a),): [["tt.divisibility", 16]] for a in types if a != "num_tokens"}
    source = ASTSource(kernel, {name: types.get(name, "constexpr") for name in names}, fixed, aligned)
    options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    ptx = compiled.asm["ptx"]
    assert f".target sm_{chip}" in ptx
    assert compiled.metadata.shared <= CHIPS[chip].shared_bytes
    assert stays_in_threads(compiled.asm["ttgir"])
    assert ptx.count("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32") == 8 * tiles * ahead
    # Weights are asked for before the earlier kernel is waited for, the input after it; no load moves past that.
    assert ".nc" not in ptx
    if chip >= 90:
        waits = ptx.index("griddepcontrol.wait")
        inputs = [found.start() for found in re.finditer(r"ld\.global\.v[24]\.b32", ptx)]
        assert ptx.index("ld.global.L1::no_allocate") < waits < min(inputs) < ptx.index("mma.sync")
