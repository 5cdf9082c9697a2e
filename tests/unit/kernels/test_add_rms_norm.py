"""The stream's sum and its norm in one pass: against both apart, kernel against reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tunesmith.kernels import launch
from tunesmith.kernels.add_rms_norm import add_rms_norm_
from tunesmith.model.layers import RMSNorm

KERNEL = """
import torch
from tunesmith.kernels.add_rms_norm import add_rms_norm_reference_
from tunesmith.kernels.add_rms_norm_triton import add_rms_norm_operator

for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 0.1)):  # the interpreter cuts bfloat16, not rounds
    for shape in ((1, 48), (5, 200)):
        generator = torch.Generator().manual_seed(shape[0])
        stream, delta = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        weight, other = torch.rand(shape[1], generator=generator), stream.clone()
        wanted = add_rms_norm_reference_(stream, delta, weight, 1e-5)
        found = add_rms_norm_operator(other, delta, weight, 1e-5)
        torch.testing.assert_close(other, stream, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_has_the_bits_of_sum_and_norm_apart(dtype: torch.dtype) -> None:
    norm = RMSNorm(48, 1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight, mean=1.0, std=0.3, generator=torch.Generator().manual_seed(7))
    stream, delta = (torch.randn(3, 48, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(2))
    wanted = stream + delta
    y = add_rms_norm_(stream, delta, norm.weight.detach(), 1e-5)
    assert torch.equal(stream, wanted)
    assert torch.equal(y, norm(wanted))


def test_the_kernel_equals_the_reference(check_interpreted: Callable[[str], None]) -> None:
    check_interpreted(KERNEL)


def test_it_waits_for_what_it_reads_where_it_may_begin_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of the machine's instructions is the assembler's; the one handed to it is checked."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tunesmith.kernels.add_rms_norm_triton import _add_rms_norm_kernel as kernel

    if not hasattr(kernel, "cache_key"):
        pytest.skip("Triton interprets here (TRITON_INTERPRET): nothing is compiled")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    names = list(kernel.arg_names)
    constants = {"WIDTH": 1024, "COLUMNS": 1024, "OVERLAP": True}
    types = {**dict.fromkeys(("stream", "delta", "weight", "y"), "*bf16"), "eps": "fp32"}
    fixed = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in types if name != "eps"}
    source = ASTSource(kernel, {name: types.get(name, "constexpr") for name in names}, fixed, aligned)
    ptx = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 2, "enable_fp_fusion": False}
    ).asm["ptx"]
    assert ptx.index("griddepcontrol.launch_dependents") < ptx.index("griddepcontrol.wait") < ptx.index("ld.global")
    assert "ld.global.v4" in ptx


def test_launches_overlap_inside_an_answering_pass_unless_it_is_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_has_overlap", lambda _: True)
    gpu = torch.device("cuda", 0)
    for value, wanted in (("1", True), ("0", False)):
        monkeypatch.setenv("TUNESMITH_OVERLAP", value)
        assert not launch.overlaps(gpu)
        with launch.overlapped():
            assert launch.overlaps(gpu) is wanted
            assert not launch.overlaps(torch.device("cpu"))
        assert not launch.overlaps(gpu)
