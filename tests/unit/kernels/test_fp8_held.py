"""Wide rows quantised in one pass: the reference's bits, and machine code that keeps its word."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

KERNEL = """
import torch
from tunesmith.kernels import fp8_held_triton, fp8_triton
from tunesmith.kernels.fp8 import quantize_rows_reference
from tunesmith.kernels.fp8_held_triton import Held
from tunesmith.kernels.fp8_triton import quantize_rows_operator

generator = torch.Generator().manual_seed(0)
fp8_triton.WIDEST = 32  # wider rows are held
wide = torch.randn(3, 90, generator=generator)
wide[1] = 0
wide[:, 77:] *= 1000  # beside the rows: never looked at
fold = torch.rand(77, generator=generator)
for dtype, factors, form in [
    (torch.float16, fold, Held(64, 1, rows=2)),
    (torch.bfloat16, fold, Held(64, 1, vector=16, wide=True)),
    (torch.float32, None, Held(64, 1, rows=3, registers=128)),
]:
    x = wide.to(dtype)[:, :77]
    fp8_held_triton.FORMS = ((4 * 77, form),)
    codes, scale = quantize_rows_operator(x, factors)
    expected, expected_scale = quantize_rows_reference(x, factors)
    assert torch.equal(scale, expected_scale), (dtype, form)
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8)), (dtype, form)
"""


def test_the_bits_are_the_references_under_tritons_interpreter(
    check_interpreted_fp8: Callable[[str], None],
) -> None:
    check_interpreted_fp8(KERNEL)


def compiled(width: int, folded: bool, chip: int) -> tuple[Any, int]:
    """The kernel as bfloat16 rows of this width take it, and its threads."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tunesmith.kernels.fp8_held_triton import _held_kernel as kernel
    from tunesmith.kernels.fp8_held_triton import held

    form = held(2 * width)
    assert form is not None
    names = list(kernel.arg_names)
    types = {"x": "*bf16", "fold": "*fp32", "codes": "*fp8e4nv", "scales": "*fp32"}
    types |= dict.fromkeys(("stride", "num_rows", "width"), "i32")
    constants: dict[str, Any] = {"FOLD": folded, "WIDE": form.wide, "BY_HAND": True, "ROWS": form.rows}
    constants |= {"PIECES": -(-width // form.columns), "COLUMNS": form.columns, "VECTOR": form.vector}
    constants |= {"INVERSE_LARGEST": 1 / 448, "SMALLEST": 2.0**-126}
    fixed = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in types if name != "num_rows"}
    source = ASTSource(kernel, {name: types.get(name, "constexpr") for name in names}, fixed, aligned)
    options = {"num_warps": form.warps, "enable_fp_fusion": False}
    options |= {} if form.registers is None else {"maxnreg": form.registers}
    return triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options), 32 * form.warps


def check_machine_code(width: int, folded: bool, chip: int, together: int, tmp_path: Path) -> None:
    """Nothing is spilled, so many programs share a processor, and every access of a row is as wide as it can be."""
    import triton

    from tunesmith.kernels.fp8_held_triton import _held_kernel as kernel

    if not hasattr(kernel, "cache_key"):
        pytest.skip("Triton interprets here (TRITON_INTERPRET): nothing is compiled")
    made, threads = compiled(width, folded, chip)
    ptx = made.asm["ptx"]
    loads = re.findall(r"ld\.global\S*", ptx)
    assert loads
    assert all("v4.b32" in load for load in loads), loads
    # The scale of a row, and the codes of a thread's sixteen bytes.
    assert set(re.findall(r"st\.global\S*", ptx)) == {"st.global.b32", "st.global.v2.b32"}
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton brings no cuobjdump, which reads registers")
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(made.asm["cubin"])
    shown = subprocess.run([tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", shown)}
    assert usage["STACK"] == usage["LOCAL"] == 0, usage
    assert together * threads * usage["REG"] <= 65536, usage


@pytest.mark.parametrize(("width", "folded", "together"), [(18944, False, 2), (37888, True, 2)])
def test_rows_of_a_7b_stay_in_registers_on_hopper(
    width: int, folded: bool, together: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were read twice before, their factors by threads whose bytes lay 64 apart."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    check_machine_code(width, folded, 90, together, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("chip", [89, 90, 100, 120])
@pytest.mark.parametrize(("width", "folded"), [(18944, True), (37888, False), (40960, False), (40960, True)])
def test_no_row_is_spilled_on_any_chip(
    chip: int, width: int, folded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    check_machine_code(width, folded, chip, 1, tmp_path)
