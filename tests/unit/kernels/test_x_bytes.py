"""Inputs in two bytes a value: what they lose, how they lie, and that the kernels have the reference's words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.kernels.add_rms_norm import add_rms_norm_reference_
from tunesmith.kernels.swiglu import swiglu_reference
from tunesmith.kernels.x_bytes import (
    add_rms_norm_bytes_,
    quantize_x_bytes,
    swiglu_bytes,
    x_bytes_reference,
    x_codes_of,
    x_of_bytes,
    x_scales_of,
)
from tunesmith.kernels.x_bytes_layout import LARGEST_CODE

KERNEL = """
import torch
from tunesmith.kernels import x_bytes_triton as mine
from tunesmith.kernels.add_rms_norm import add_rms_norm_reference_
from tunesmith.kernels.swiglu import swiglu_reference
from tunesmith.kernels.x_bytes import x_bytes_reference, x_of_bytes

torch.manual_seed(0)
for dtype in (torch.bfloat16, torch.float16):
    for tokens, width in ((1, 128), (3, 768), (2, 1280)):
        x = torch.randn(tokens, width) * torch.randn(tokens, 1).exp()
        x[:, 5] *= 300
        x = x.to(dtype)
        if tokens == 3:
            x[0, 3], x[0, 300], x[1, 200], x[2] = float("inf"), float("-inf"), float("nan"), 0.0
        assert torch.equal(mine.x_bytes_operator(x), x_bytes_reference(x)), (dtype, tokens)
        rows = torch.randn(tokens, 2 * width).to(dtype)[:, :width]  # of a wider tensor
        assert torch.equal(mine.x_bytes_operator(rows), x_bytes_reference(rows))
for tokens, width in ((1, 256), (3, 640)):
    gate_up = torch.randn(tokens, 2 * width).to(torch.float16)
    gate_up[-1, 130], gate_up[-1, 7] = 60000.0, float("nan")
    assert torch.equal(mine.swiglu_bytes_operator(gate_up), x_bytes_reference(swiglu_reference(gate_up)))
    stream, delta = torch.randn(2, tokens, width).to(torch.float16)
    weight, other = torch.rand(width), stream.clone()
    wanted = x_of_bytes(x_bytes_reference(add_rms_norm_reference_(stream, delta, weight, 1e-5)), torch.float32)
    found = x_of_bytes(mine.add_rms_norm_bytes_operator(other, delta, weight, 1e-5), torch.float32)
    assert torch.equal(other, stream)
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=1e-3)  # a sum in another order: a last bit of float16
torch.library.opcheck(mine.x_bytes_operator, (torch.randn(2, 128),), test_utils=("test_schema", "test_faketensor"))
"""


def given(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 512, generator=generator)
    x[1, 130] = 900.0  # an outlier
    x[2] *= 1e-30
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_value_is_off_by_half_a_scale(dtype: torch.dtype) -> None:
    x = given(dtype)
    back = x_of_bytes(x_bytes_reference(x), torch.float32)
    largest = x.float().unflatten(1, (-1, 128)).abs().amax(-1, keepdim=True)
    error = (back - x.float()).unflatten(1, (-1, 128)).abs()
    # Scale, inverse and product are rounded in float32: some 2^-23 of codes up to 32,512.
    assert bool((error <= largest * 0.505 / LARGEST_CODE + 1e-37).all())
    assert 0.505 / LARGEST_CODE < 2.0**-15.96


def test_words_hold_the_columns_of_int4s_nibbles() -> None:
    """Column 16 j + i of a block is nibble j of word i: bytes of even nibbles first, then of odd ones."""
    x = torch.zeros(1, 256)
    x[0, 128 + 16 * 5 + 3], x[0, 128] = 1.0, -2.0
    made = x_bytes_reference(x)
    codes = x_codes_of(made)
    assert made.shape == (1, 2, 72)
    assert codes[0, 1, 83] == LARGEST_CODE // 2
    assert codes[0, 1, 0] == -LARGEST_CODE
    high = made[0, 1, :32]
    # nibble 5: odd, the third of its four
    assert (int(high[16 + 3]) >> 16) & 255 == (LARGEST_CODE // 2 + 128) >> 8
    assert int(high[0]) & 255 == 256 - 127
    assert int((high != 0).sum()) == 2


def test_sums_are_of_a_block_its_halves_and_its_quarters() -> None:
    made = x_bytes_reference(given())
    codes, sums = x_codes_of(made), made[:, :, 65:] // -16
    assert torch.equal(sums[:, :, 0], codes.sum(-1))
    assert torch.equal(sums[:, :, 1:3].long(), codes.unflatten(2, (2, 64)).sum(-1))
    assert torch.equal(sums[:, :, 3:].long(), codes.unflatten(2, (4, 32)).sum(-1))


@pytest.mark.parametrize("wrong", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_makes_its_block_nan_and_no_other(wrong: float) -> None:
    x = given()
    x[0, 140] = wrong
    made = x_bytes_reference(x)
    assert bool(x_scales_of(made)[0, 1].isnan())
    assert not bool(x_codes_of(made)[0, 1].any())
    others = torch.ones(4, 4, dtype=torch.bool)
    others[0, 1] = False
    assert torch.equal(made[others], x_bytes_reference(given())[others])


def test_rows_of_zeros_and_of_nearly_nothing_stay_so() -> None:
    x = torch.zeros(2, 128)
    x[1, 3] = 1e-41
    back = x_of_bytes(x_bytes_reference(x), torch.float32)
    assert not bool(back[0].any())
    assert float(back[1].abs().max()) < 2e-38


def test_without_kernels_each_is_both_apart() -> None:
    x = given()
    assert torch.equal(quantize_x_bytes(x), x_bytes_reference(x))
    gate_up = torch.cat([x, x.flip(1)], dim=1)
    assert torch.equal(swiglu_bytes(gate_up), x_bytes_reference(swiglu_reference(gate_up)))
    stream, other, weight = x.clone(), x.clone(), torch.rand(512)
    wanted = x_bytes_reference(add_rms_norm_reference_(other, x.flip(0), weight, 1e-6))
    assert torch.equal(add_rms_norm_bytes_(stream, x.flip(0), weight, 1e-6), wanted)
    assert torch.equal(stream, other)


def test_the_kernels_equal_the_reference_under_tritons_interpreter(check_interpreted: Callable[[str], None]) -> None:
    check_interpreted(KERNEL)


def kernels() -> dict[str, tuple[Any, dict[str, str], dict[str, Any], int]]:
    from tunesmith.kernels import x_bytes_triton as mine

    types = dict.fromkeys(("x", "stream", "delta", "weight"), "*bf16") | {"out": "*i32", "stride": "i32", "eps": "fp32"}
    return {
        "x": (mine._blocks_kernel, types, {"WIDTH": 3584, "BLOCKS": 4, "GATED": 0}, 4),
        "swiglu": (mine._blocks_kernel, types, {"WIDTH": 18944, "BLOCKS": 4, "GATED": 1}, 4),
        "norm": (mine._norm_kernel, types, {"WIDTH": 3584, "BLOCKS": 32}, 8),
    }


@pytest.mark.parametrize("name", ["x", "swiglu", "norm"])
@pytest.mark.parametrize("chip", [80, *(pytest.param(c, marks=pytest.mark.long) for c in (86, 89)), 90, 100, 120])
def test_they_compile_and_wait_for_what_they_read(
    name: str, chip: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, types, constants, warps = kernels()[name]
    if not hasattr(kernel, "cache_key"):
        pytest.skip("Triton interprets here (TRITON_INTERPRET): nothing is compiled")
    names, overlaps = list(kernel.arg_names), chip >= 90
    signature = {argument: types.get(argument, "constexpr") for argument in names}
    fixed = {(names.index(a),): value for a, value in {**constants, "OVERLAP": overlaps}.items()}
    aligned = {(names.index(a),): [["tt.divisibility", 16]] for a in names if a in types and a != "eps"}
    source = ASTSource(kernel, signature, fixed, aligned)
    options = {"num_warps": warps, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    ptx = compiled.asm["ptx"]
    assert f".target sm_{chip}" in ptx
    assert compiled.metadata.shared <= 48 * 1024
    assert "convert_layout" not in compiled.asm["ttgir"]  # nothing goes through shared memory
    if overlaps:
        assert ptx.index("griddepcontrol.launch_dependents") < ptx.index("griddepcontrol.wait")
        assert ptx.index("griddepcontrol.wait") < ptx.index("ld.global")
