"""RMSNorm, rope and SwiGLU compile for every chip, without a GPU, to wide loads and little shared memory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tunesmith.kernels.launch import tile

triton = pytest.importorskip("triton")
CHIPS = (80, 86, 89, 90, 100, 120)
# What a block gets on every chip without asking for more.
SHARED_BYTES = 48 * 1024


def kernels() -> dict[str, tuple[Any, dict[str, str], dict[str, Any], int]]:
    """Every kernel with its arguments' types (integers are multiples of 16), its constants and its warps."""
    from triton.language import bfloat16

    from tunesmith.kernels import nf4_triton, nf4_weight, rms_norm_triton, rope_triton, scale_triton, swiglu_triton

    stream, wide = "*bf16", "*fp32"
    rows, columns, warps = tile(3584)
    shape = {"INNER": 1, "WIDTH": 3584, "ROWS": rows, "COLUMNS": columns}
    norm = {"x": stream, "weight": stream, "rstd": wide}
    strides = dict.fromkeys(("grad_outer", "grad_inner", "x_outer", "x_inner", "add_outer", "add_inner"), "i32")
    counts = {"num_rows": "i32", "num_tiles": "i32"}
    backward = {"grad_y": stream, **norm, "add": stream, "grad_x": stream, "partial": wide, **counts, **strides}
    heads_of_128 = {"INNER": 32, "WIDTH": 128, "HAS_ADD": 0, "WEIGHT_GRAD": 1, "AHEAD": 1}
    rope = {"x": stream, "cos": wide, "sin": wide, "token_stride": "i32", "head_stride": "i32"}
    heads = {"last_stride": 1, "NUM_HEADS": 32, "HALF": 64, "HEADS": 32, "COLUMNS": 64, "INVERSE": 0}
    place = {"WIDTH": 18944, "COLUMNS": 2048}
    swiglu = dict.fromkeys(("grad_h", "gate_up", "out", "h"), stream)
    swiglu |= dict.fromkeys(("grad_stride", "stride", "out_stride"), "i32")
    held = {"codes": "*i32", "scales": "*u8", "scale_scales": wide, "offset": wide, "out": stream}
    weights = {f"{name}{part}": kind for part in range(nf4_triton.TOGETHER) for name, kind in held.items()}
    weights |= dict.fromkeys(("count0", "count1", "count2", "until0", "until1"), "i32")
    blocks = {"BLOCK": nf4_weight.BLOCK, "SCALE_BLOCK": nf4_weight.SCALE_BLOCK, "BLOCKS": nf4_triton.BLOCKS}
    return {
        "nf4_dequantize": (
            nf4_triton._dequantize_kernel,
            {**weights, "table": wide, "dynamic": wide},
            {**blocks, "WORDS": 1, "DOUBLE": 1, "THROUGH": bfloat16},
            nf4_triton.WARPS,
        ),
        "scale": (
            scale_triton._scale_kernel,
            {"values": stream, "factor": wide, "count": "i32"},
            {"BLOCK": scale_triton.BLOCK},
            scale_triton.WARPS,
        ),
        "rms_norm": (
            rms_norm_triton._normalise_kernel,
            {**norm, "y": stream, "num_rows": "i32", "x_outer": "i32", "x_inner": "i32", "eps": "fp32"},
            {**shape, "AGAIN": 0},
            warps,
        ),
        "rms_norm_backward": (
            rms_norm_triton._backward_kernel,
            backward,
            {**shape, "HAS_ADD": 1, "WEIGHT_GRAD": 0, "AHEAD": 0},
            warps,
        ),
        "rms_norm_backward_weight": (
            rms_norm_triton._backward_kernel,
            backward,
            {**shape, "HAS_ADD": 1, "WEIGHT_GRAD": 1, "AHEAD": 1},
            warps,
        ),
        "rms_norm_heads_backward_weight": (
            rms_norm_triton._backward_kernel,
            backward,
            {**dict(zip(("ROWS", "COLUMNS"), tile(128)[:2], strict=True)), **heads_of_128},
            tile(128)[2],
        ),
        "rms_norm_sums": (
            rms_norm_triton._sum_kernel,
            {"partial": wide, "total": wide, "num_rows": "i32"},
            {"WIDTH": 128, "ROWS": rms_norm_triton._SUM_ROWS, "COLUMNS": rms_norm_triton._SUM_COLUMNS},
            4,
        ),
        "rope": (rope_triton._rope_kernel, rope, heads, 4),
        "swiglu": (swiglu_triton._forward_kernel, {"gate_up": stream, "h": stream, "stride": "i32"}, place, 4),
        "swiglu_backward": (swiglu_triton._backward_kernel, swiglu, {**place, "WANT_H": 1}, 4),
    }


NAMES = [
    "nf4_dequantize",
    "scale",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_backward_weight",
    "rms_norm_heads_backward_weight",
    "rms_norm_sums",
    "rope",
    "swiglu",
    "swiglu_backward",
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
    aligned = [argument for argument, kind in types.items() if kind in ("i32", "*bf16", "*fp32")]
    attributes = {
        (names.index(argument),): [["tt.divisibility", 16]] for argument in aligned if not argument.startswith("num_")
    }
    fixed = {(names.index(argument),): value for argument, value in constants.items()}
    for chip in CHIPS:
        source = ASTSource(kernel, signature, fixed, attributes)
        options = {"num_warps": warps, "enable_fp_fusion": False}
        compiled = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
        ptx = compiled.asm["ptx"]
        assert f".target sm_{chip}" in ptx
        assert compiled.metadata.shared <= SHARED_BYTES
        moves = re.findall(r"(?:ld|st)\.global\S*\.[bf]\d+", ptx)
        assert moves
        if name == "rms_norm_heads_backward_weight":
            # A head has no more values than the program threads: its weight once, its sums once; and it has many
            # rows, of which a thread sees two.
            for move in ("ld.global.b16", "st.global.b32", "ld.global.b32"):
                moves.remove(move)
        if name == "nf4_dequantize":
            # Codes in words, their values from a table: what is wide is the store.
            assert {move for move in moves if move.startswith("st")} <= {"st.global.v4.b32"}, (chip, moves)
            continue
        # Sixteen bytes at a time; a row's statistics alone are single numbers.
        assert {move for move in moves if "v4.b32" not in move} <= {"ld.global.b32", "st.global.b32"}, (chip, moves)
        assert sum("v4.b32" not in move for move in moves) <= 1
