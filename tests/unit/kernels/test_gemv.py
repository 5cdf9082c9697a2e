"""Products of few tokens: the kernels equal plain torch under Triton's interpreter, and compile for every chip."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.hardware import GENERATIONS

triton = pytest.importorskip("triton")
CHIPS = {10 * major + minor: generation for (major, minor), generation in GENERATIONS.items() if major >= 8}
KERNEL = """
import itertools
import torch
from tunesmith.kernels import gemv_operators as ops
from tunesmith.kernels.fp8 import dequantize_fp8_weight, quantize_fp8_weight
from tunesmith.kernels.int4 import dequantize_int4, quantize_int4
from tunesmith.kernels.int8 import dequantize_int8, quantize_int8
from tunesmith.kernels.nf4 import dequantize_reference, quantize_nf4

torch.manual_seed(0)
float32, float16 = torch.float32, torch.float16

def check(mine, x, weight, bias, what):
    truth = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    scale = (x.double().abs() @ weight.double().abs().t()).clamp(min=1e-9)
    error = ((mine.double() - truth).abs() / scale).max()
    assert mine.dtype == x.dtype and error < (2e-6 if x.dtype == float32 else 2e-3), (what, float(error))

for rows, width, tokens in ((21, 192, 1), (70, 320, 3), (5, 4288, 1)):
    weight, bias = torch.randn(rows, width) * 0.1, torch.randn(rows)
    dtype = float32 if tokens == 1 else float16
    x = torch.randn(tokens, width).to(dtype)
    int8, fp8 = quantize_int8(weight), quantize_fp8_weight(weight)
    for b in (None, bias) if width < 300 else (None,):  # int4 has a bias at every width
        check(ops.float_operator(x, weight.to(float16), b), x, weight.to(float16), b, "float")
        check(ops.int8_operator(x, int8.codes, int8.scale, b), x, dequantize_int8(int8.codes, int8.scale, float32), b,
              "int8")
        check(ops.fp8_operator(x, fp8.codes, fp8.scale, b), x, dequantize_fp8_weight(fp8, float32), b, "fp8")
    for group, symmetric in ((128, False), (64, True), (32, False)):
        int4 = quantize_int4(weight, group, symmetric)
        check(ops.int4_operator(x, int4.words, int4.scales, int4.zeros, bias), x, dequantize_int4(int4), bias,
              ("int4", group, symmetric))
    if tokens == 1:
        for double in (False, True):
            parts = [quantize_nf4(weight[:3], double), quantize_nf4(weight[3:], double)]
            empty = torch.empty(0)
            mine = ops.nf4_operator(
                x, [p.codes for p in parts], [p.scales for p in parts],
                [p.scale_scales if double else empty for p in parts], [p.offset if double else empty for p in parts],
                bias)
            check(mine, x, torch.cat([dequantize_reference(p) for p in parts]), bias, ("nf4", double))
bfloat16 = torch.bfloat16
for dtype, rows, width, tokens, what in (
    (bfloat16, 9, 256, 1, "int4"), (float16, 20, 128, 2, "int8"), (bfloat16, 5, 256, 17, "fp8"),
    (bfloat16, 20, 192, 3, "float"),
):
    weight, bias, x = torch.randn(rows, width) * 0.1, torch.randn(rows), torch.randn(tokens, width).to(dtype)
    unit = 2.0**-8 if dtype == bfloat16 else 2.0**-10
    if what == "int4":
        int4 = quantize_int4(weight, 64)
        mine, dense = ops.int4_operator(x, int4.words, int4.scales, int4.zeros, bias), dequantize_int4(int4, float32)
    elif what == "float":
        dense = weight.to(dtype)
        mine = ops.float_operator(x, dense, bias.to(dtype))
    elif what == "int8":
        int8 = quantize_int8(weight)
        mine = ops.int8_operator(x, int8.codes, int8.scale, bias)
        dense = dequantize_int8(int8.codes, int8.scale, float32)
    else:
        fp8 = quantize_fp8_weight(weight)
        mine, dense = ops.fp8_operator(x, fp8.codes, fp8.scale, bias), dequantize_fp8_weight(fp8, float32)
    truth = x.double() @ dense.double().t() + bias.double()
    size = x.double().abs() @ dense.double().abs().t() + bias.double().abs()
    error = float(((mine.double() - truth).abs() / size).max())
    assert mine.dtype == dtype and error < unit, ("fragments", what, error)
# Programs of 8 and of 32 rows, steps ahead that go around once and several times, the last not whole.
from tunesmith.kernels.gemv_quads_triton import quads
x, weight = torch.randn(2, 768).to(float16), torch.randn(40, 768) * 0.1
int4 = quantize_int4(weight, 32)
int4 = type(int4)(int4.words, int4.scales.to(float16), int4.zeros, int4.shape, int4.dtype)
cases = [(0, weight.to(float16), None, None, 1, (8, 2, 4), weight.to(float16)),
         (3, int4.words, int4.scales, int4.zeros, 4, (32, 2, 2), dequantize_int4(int4, float32))]
for format_id, codes, scales, zeros, per_block, shape, dense in cases:
    out = torch.full((2, 40), float("nan"), dtype=float16)
    assert quads(format_id, x, codes, scales, zeros, None, out, per_block=per_block, shape=shape)
    truth, size = x.double() @ dense.double().t(), x.double().abs() @ dense.double().abs().t()
    assert ((out.double() - truth).abs() / size).max() < 2.0**-10, format_id
from tunesmith.kernels.int4 import dequantize_reference as int4_truth
from tunesmith.kernels.int4_triton import int4_dequantize_operator, int8_dequantize_operator
for group, symmetric in ((128, True), (64, False), (32, False)):
    held = quantize_int4(torch.randn(5, 300), group, symmetric)
    mine = int4_dequantize_operator(held.words, held.scales, held.zeros, 300, float16)
    assert torch.equal(mine, int4_truth(held, float16)), group
held = quantize_int8(torch.randn(5, 300))
mine = int8_dequantize_operator(held.codes, held.scale, float16)
assert torch.equal(mine, dequantize_int8(held.codes, held.scale, float16))
words = quantize_int4(torch.randn(4, 128), 128, True)
# Gates and what they gate, in one launch: rounded as by two.
from tunesmith.kernels.swiglu import swiglu_reference
for format_id, tokens, rows in ((0, 1, 40), (3, 3, 24), (3, 12, 40), (2, 11, 40), (1, 2, 17), (0, 9, 8)):
    x, dense = torch.randn(tokens, 768).to(float16), torch.randn(2 * rows, 768) * 0.05
    bias = torch.randn(2 * rows).to(float16)
    if format_id == 3:
        held = quantize_int4(dense, 128)
        given = (held.words, held.scales.to(float16), held.zeros)
        dense = dequantize_int4(type(held)(*given, held.shape, held.dtype), float32)
    elif format_id == 2:
        held = quantize_fp8_weight(dense)
        given, dense = (held.codes, held.scale, None), dequantize_fp8_weight(held, float32)
    elif format_id == 1:
        held = quantize_int8(dense)
        given, dense = (held.codes, held.scale, None), dequantize_int8(held.codes, held.scale, float32)
    else:
        given = (dense.to(float16), None, None)
    mine = ops.swiglu_few_operator(format_id, x, *given, bias)
    wide = dense.to(float16).float() if format_id == 0 else dense
    truth = swiglu_reference((x.float() @ wide.T + bias.float()).to(float16))
    assert mine.shape == (tokens, rows)
    torch.testing.assert_close(mine, truth, rtol=4e-3, atol=4e-3)
from tunesmith.kernels.fp8 import product_reference, quantize_rows_reference
from tunesmith.kernels.fp8_split_triton import split_product_operator
for tokens, rows, width, parts, has_bias in ((5, 130, 640, 2, True), (20, 40, 384, 3, False)):
    x = quantize_rows_reference(torch.randn(tokens, width))
    codes, scale = quantize_rows_reference(torch.randn(rows, width))
    bias = torch.randn(rows) if has_bias else None
    wanted = product_reference(*x, codes, scale.view(-1), bias, float32)
    found = split_product_operator(*x, codes, scale.view(-1), bias, parts).float()
    torch.testing.assert_close(found, wanted, rtol=2**-7, atol=2e-3)  # bfloat16 is cut here, not rounded
torch.library.opcheck(ops.int4_operator, (torch.randn(1, 128), words.words, words.scales, None, None),
                      test_utils=("test_schema", "test_faketensor"))
"""


def test_kernels_equal_the_dequantised_product_under_tritons_interpreter(
    check_interpreted: Callable[[str], None],
) -> None:
    check_interpreted(KERNEL)


def kernels() -> dict[str, tuple[Any, dict[str, str], dict[str, Any], int, int]]:
    """Every kernel with its arguments' types, its constants, warps and stages, at Qwen2.5-7B's widths."""
    from tunesmith.kernels import gemv_dot_triton as few
    from tunesmith.kernels import gemv_quads_triton as quads
    from tunesmith.kernels import gemv_triton as one
    from tunesmith.kernels import int4_triton as dense

    weights = {
        0: ("*bf16", "*fp32"),
        1: ("*i8", "*fp32"),
        2: ("*i8", "*fp32"),
        3: ("*i32", "*bf16"),
        4: ("*i32", "*u8"),
    }
    common = {"x": "*bf16", "zeros": "*u8", "bias": "*bf16", "out": "*bf16", "num_rows": "i32"}
    common |= dict.fromkeys(("inner", "offset", "table", "dynamic"), "*fp32")
    found: dict[str, tuple[Any, dict[str, str], dict[str, Any], int, int]] = {}
    for format_id, (weight, scales) in weights.items():
        types = {**common, "w": weight, "scales": scales}
        constants: dict[str, Any] = {"FORMAT": format_id, "PER_BLOCK": 1, "ZEROS": int(format_id >= 3), "BIAS": 1}
        rows, warps = one.SHAPES[format_id]
        lanes = {**constants, "WIDTH": 3584, "ROWS": rows, "LANES": 32 * warps}
        found[f"one token, {format_id}"] = (one.gemv_kernel, types, lanes, warps, 1)
        if format_id in few.SHAPES:
            rows, step, warps, stages = few.SHAPES[format_id]
            tile = {**constants, "ROWS": rows, "STEP": step, "TOKENS": 16, "BY_HAND": 1}
            found[f"few tokens, {format_id}"] = (
                few.dot_kernel,
                {**types, "num_tokens": "i32", "width": "i32"},
                tile,
                warps,
                stages,
            )
        if format_id in quads.COLUMNS:
            words = {**types, "x": "*i32", "w": "*i32", "zeros": "*i16", "num_tokens": "i32"}
            words["scales"] = "*i32" if format_id == 3 else "*fp32"
            sizes = {**constants, "WIDTH": 3584, "SCALE_HALF": False, "ROWS": 16, "TOKEN_TILES": 2, "WARPS": 4}
            sizes |= {"AHEAD": 2, "BY_HAND": 1, "OVERLAP": 0, "GATED": 0}
            found[f"fragments, {format_id}"] = (quads.quad_kernel, words, sizes, 4, 1)
            found[f"fragments, gated, {format_id}"] = (quads.quad_kernel, words, {**sizes, "GATED": 1}, 4, 1)
    many = {"words": "*i32", "scales": "*bf16", "zeros": "*u8", "out": "*bf16", "num_words": "i32", "width": "i32"}
    sizes = {"PER_BLOCK": 1, "ZEROS": 1, "WORDS": dense.WORDS_AT_ONCE}
    found["int4 dequantised"] = (dense.int4_dequantize_kernel, many, sizes, 2, 1)
    int8 = {"codes": "*i8", "scale": "*fp32", "out": "*bf16", "width": "i32"}
    found["int8 dequantised"] = (dense.int8_dequantize_kernel, int8, {"COLUMNS": dense.BYTES_AT_ONCE}, 4, 1)
    return found


DENSE = ["int4 dequantised", "int8 dequantised"]
NAMES = [*DENSE, *[f"one token, {i}" for i in range(5)], *[f"few tokens, {i}" for i in range(4)]]
NAMES += [f"fragments, {gated}{i}" for gated in ("", "gated, ") for i in range(4)]
QUICK = [*[(name, 90) for name in DENSE], ("one token, 2", 80), ("few tokens, 1", 90)]
QUICK += [("fragments, 3", 90), ("fragments, gated, 2", 90)]
OTHERS = [pytest.param(n, c, marks=pytest.mark.long) for n in NAMES for c in CHIPS if (n, c) not in QUICK]


@pytest.mark.parametrize(("name", "chip"), [*QUICK, *OTHERS])
def test_compiles_for_every_chip(name: str, chip: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, types, constants, warps, stages = kernels()[name]
    if not hasattr(kernel, "cache_key"):
        pytest.skip("Triton interprets here (TRITON_INTERPRET): nothing is compiled")
    names = list(kernel.arg_names)
    if "OVERLAP" in constants:
        constants = {**constants, "OVERLAP": int(chip >= 90)}
    types = {argument: kind for argument, kind in types.items() if argument in names}
    signature = {argument: types.get(argument, "constexpr") for argument in names}
    fixed = {(names.index(argument),): value for argument, value in constants.items()}
    aligned = {(names.index(a),): [["tt.divisibility", 16]] for a in types if a != "num_tokens"}
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    source, target = ASTSource(kernel, signature, fixed, aligned), GPUTarget("cuda", chip, 32)
    compiled = triton.compile(source, target=target, options=options)
    ptx = compiled.asm["ptx"]
    assert f".target sm_{chip}" in ptx
    assert compiled.metadata.shared <= CHIPS[chip].shared_bytes, (chip, compiled.metadata.shared)
    if name.startswith("fragments"):
        from tunesmith.kernels.gemv_quads_triton import stays_in_threads

        assert stays_in_threads(compiled.asm["ttgir"])
        # Weights are asked for before the earlier kernel is waited for, and by loads that no assembler moves past that.
        assert ".nc" not in ptx
        if chip >= 90:
            wait = ptx.index("griddepcontrol.wait")
            assert ptx.index("ld.global.L1::no_allocate") < wait < ptx.index("mma.sync")
    # Weights come sixteen bytes at a time: into registers, or straight into shared memory.
    assert "v4.b32" in ptx or "cp.async.cg.shared.global" in ptx or "bulk" in ptx
