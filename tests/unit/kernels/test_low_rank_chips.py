"""The kernels with the adapters' sums and with fp8 codes compile for every chip that can run them, without a GPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tunesmith.kernels.fp8 import LARGEST, SMALLEST_SCALE
from tunesmith.kernels.launch import tile

triton = pytest.importorskip("triton")
CHIPS = (80, 86, 89, 90, 100, 120)
# What a block gets on every chip without asking for more.
SHARED_BYTES = 48 * 1024
RANKS = {"RANK": 32, "CHUNK": 32}
GRAD_RANKS = {"GRAD_RANK": 16, "GRAD_CHUNK": 16}
SCALES: dict[str, float] = {"INVERSE_LARGEST": 1 / LARGEST, "SMALLEST": SMALLEST_SCALE}


def kernels() -> dict[str, tuple[Any, dict[str, str], dict[str, float], int]]:
    """Every kernel with its arguments' types (strides are multiples of 16), its constants and its warps."""
    from tunesmith.kernels import norm_fp8_triton, swiglu_fp8_triton, swiglu_low_rank_triton
    from tunesmith.kernels import swiglu_low_rank_grads_triton as sums

    stream, wide, count = "*bf16", "*fp32", "i32"
    low, fp8 = swiglu_low_rank_triton, swiglu_fp8_triton
    forward = {**dict.fromkeys(("gate_up", "low", "up", "h"), stream), "num_rows": count, "stride": count}
    backward = {**forward, **dict.fromkeys(("grad_h", "dlow", "down", "out"), stream)}
    backward |= dict.fromkeys(("grad_stride", "out_stride"), count)
    gradients = {"of_up": wide, "of_down": wide}
    counters = {**dict.fromkeys(("largest", "done", "ticket"), "*i32"), "codes": "*fp8e4nv", "scales": wide}
    counters |= dict.fromkeys(("num_groups", "num_behind"), count)
    shape: dict[str, float] = {"WIDTH": 18944, "ROWS": low.ROWS, "COLUMNS": low.COLUMNS, "STEPS": low.STEPS, **RANKS}
    below: dict[str, float] = {"ROWS": low.BACKWARD_ROWS, "STEPS": low.BACKWARD_STEPS}
    grouped = {**shape, "ROWS": fp8.ROWS, "COLUMNS": fp8.COLUMNS, "STEPS": fp8.STEPS, **SCALES}
    rows, columns, warps = tile(3584)
    norm = {"x": stream, "weight": stream, "y": stream, "rstd": wide, "codes": "*fp8e4nv", "scales": wide}
    norm |= {"num_rows": count, "stride": count, "eps": "fp32"}
    rest: dict[str, float] = {**GRAD_RANKS, "WANT_H": 1}
    return {
        "swiglu_low_rank": (low._forward_kernel, forward, shape, low.WARPS),
        "swiglu_low_rank_backward": (low._backward_kernel, backward, {**shape, **rest, **below}, low.WARPS),
        "swiglu_low_rank_grads": (
            sums._grads_kernel,
            {**{name: kind for name, kind in backward.items() if name not in ("h", "out", "out_stride")}, **gradients},
            {**shape, **GRAD_RANKS, "ROWS": sums.ROWS, "COLUMNS": sums.COLUMNS, "STEPS": sums.STEPS},
            sums.WARPS,
        ),
        "swiglu_fp8": (fp8._forward_kernel, {**forward, **counters}, grouped, fp8.WARPS),
        "swiglu_fp8_backward": (
            fp8._backward_kernel,
            {**backward, **counters, "fold": wide},
            {**grouped, **rest, "FOLD": 1},
            fp8.WARPS,
        ),
        "rms_norm_fp8": (
            norm_fp8_triton._kernel,
            norm,
            {"WIDTH": 3584, "ROWS": rows, "COLUMNS": columns, **SCALES},
            warps,
        ),
    }


NAMES = [
    "swiglu_low_rank",
    "swiglu_low_rank_backward",
    "swiglu_low_rank_grads",
    "swiglu_fp8",
    "swiglu_fp8_backward",
    "rms_norm_fp8",
]


@pytest.mark.parametrize("name", NAMES)
def test_compiles_for_every_chip(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, types, constants, warps = kernels()[name]
    if not hasattr(kernel, "cache_key"):
        pytest.skip("Triton interprets here (TRITON_INTERPRET): nothing is compiled")
    names = list(kernel.arg_names)
    signature = {argument: types.get(argument, "constexpr") for argument in names}
    aligned = [argument for argument, kind in types.items() if kind != "fp32" and not argument.startswith("num_")]
    attributes = {(names.index(argument),): [["tt.divisibility", 16]] for argument in aligned}
    fixed = {(names.index(argument),): value for argument, value in constants.items()}
    for chip in CHIPS:
        if "fp8" in name and chip < 89:
            continue  # no conversion to fp8 there: `require_fp8` refuses such a chip
        source = ASTSource(kernel, signature, fixed, attributes)
        options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": False}
        compiled = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
        ptx = compiled.asm["ptx"]
        assert f".target sm_{chip}" in ptx
        assert compiled.metadata.shared <= SHARED_BYTES
        stores = re.findall(r"st\.global\S*\.[bf]\d+", ptx)
        # Sixteen bytes at a time; a row's statistics alone are single numbers.
        assert {store for store in stores if "v4.b32" not in store} <= {"st.global.b32"}, (chip, stores)
        loads = re.findall(r"ld\.global\S*\.[bf]\d+", ptx)
        assert not [load for load in loads if "b16" in load or "b8" in load], (chip, loads)
        assert sum("v4.b32" in load for load in loads) >= 4
        if name != "rms_norm_fp8":
            assert re.search(r"wgmma|mma\.sync|tcgen05\.mma", ptx), chip
