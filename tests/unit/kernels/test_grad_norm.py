"""The norm over all gradients: what torch finds, whichever tensors take the kernel, and the kernel itself."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from tunesmith.kernels import grad_norm
from tunesmith.kernels.grad_norm import PART, global_norm, part_norms_reference


def test_global_norm() -> None:
    assert global_norm([torch.tensor([3.0]), torch.tensor([[4.0]])]).item() == pytest.approx(5.0)
    assert global_norm([]).item() == 0.0
    assert global_norm([torch.full((4,), 2.0).bfloat16()]).dtype == torch.float32


def _gradients() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((3, PART), (17, 48), (PART + 1,), (200,))
    wide = [torch.randn(size, generator=generator) * 3**i for i, size in enumerate(sizes)]
    return [*wide, wide[0].bfloat16(), wide[0].t()]


def test_large_and_small_tensors_are_one_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The large ones by the kernel's reference, which a non-contiguous one does not reach."""
    gradients = _gradients()
    expected = torch.cat([gradient.double().flatten() for gradient in gradients]).norm()
    assert global_norm(gradients).item() == pytest.approx(expected.item(), rel=1e-6)
    taken: list[int] = []

    def reference(given: list[torch.Tensor]) -> torch.Tensor:
        taken.extend(gradient.numel() for gradient in given)
        return part_norms_reference(given)

    monkeypatch.setattr(grad_norm, "part_norms", reference)
    monkeypatch.setattr(grad_norm, "use_kernel", lambda device: True)
    monkeypatch.setattr(grad_norm, "LARGE_BYTES", 2 * PART)
    assert global_norm(gradients).item() == pytest.approx(expected.item(), rel=1e-6)
    assert taken == [3 * PART, PART + 1, 3 * PART]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = _gradients()
    gradients[0][2, 5] = bad
    monkeypatch.setattr(grad_norm, "part_norms", part_norms_reference)
    monkeypatch.setattr(grad_norm, "use_kernel", lambda device: True)
    monkeypatch.setattr(grad_norm, "LARGE_BYTES", 2 * PART)
    assert not global_norm(gradients).isfinite()


def test_parts_are_counted() -> None:
    gradients = [torch.ones(1), torch.ones(PART), torch.ones(PART + 1)]
    assert len(part_norms_reference(gradients)) == 4


KERNEL = """
import itertools
import torch
from tunesmith.kernels.grad_norm import PART, part_norms, part_norms_reference
from tunesmith.kernels.grad_norm_triton import part_norms_operator

generator = torch.Generator().manual_seed(0)
sizes = [(1,), (3, 200), (17, 48), (PART,), (PART - 1,), (2 * PART + 96,)]
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    gradients = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    norms = part_norms(gradients)
    exact = [part.double().norm() for gradient in gradients for part in gradient.flatten().split(PART)]
    torch.testing.assert_close(norms, torch.stack(exact).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(norms, part_norms_reference(gradients), rtol=1e-5, atol=0)  # torch sums in float32 too
    assert torch.equal(norms, part_norms(gradients))
    gradients[3][7] = float("inf")
    gradients[5][-1] = float("nan")
    norms = part_norms(gradients)
    assert norms[3].isinf() and norms[-1].isnan() and norms[[0, 1, 2, 4, 5, 6]].isfinite().all()
torch.library.opcheck(part_norms_operator, (gradients[:3], PART), test_utils=("test_schema", "test_faketensor"))
"""


def test_kernel_equals_the_reference_under_tritons_interpreter(check_interpreted: Callable[[str], None]) -> None:
    check_interpreted(KERNEL)


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("kind", ["*bf16", "*fp32"])
def test_it_compiles_for_every_chip_to_16_byte_loads(capability: int, kind: str) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tunesmith.kernels.grad_norm_triton import BLOCK, WARPS, _norm_kernel

    if not hasattr(_norm_kernel, "cache_key"):
        pytest.skip("Triton interprets here (TRITON_INTERPRET): nothing is compiled")
    names = list(_norm_kernel.arg_names)
    signature = {"values": kind, "norms": "*fp32", "start": "i64", "count": "i64"}
    signature |= dict.fromkeys(("BLOCK", "ROUNDS"), "constexpr")
    constants = {(names.index("BLOCK"),): BLOCK, (names.index("ROUNDS"),): PART // BLOCK}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in ("values", "count")}
    source = ASTSource(_norm_kernel, signature, constants, aligned)
    options = {"num_warps": WARPS, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.metadata.shared <= 1024
    loads = re.findall(r"ld\.global\S*\.[bf]\d+", compiled.asm["ptx"])
    assert loads
    assert all("v4.b32" in load for load in loads)
