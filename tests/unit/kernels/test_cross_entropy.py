"""Cross-entropy in place: the reference against torch's own, the Triton kernel against the reference."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tunesmith.kernels.cross_entropy import IGNORED, cross_entropy, cross_entropy_and_grad_

HALF = {torch.bfloat16: 2**-8, torch.float16: 2**-10}


def _inputs(rows: int, vocab_size: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * 1009 + vocab_size)
    logits = (torch.randn(rows, vocab_size, generator=generator) * 4).to(dtype)
    return logits, torch.randint(0, vocab_size, (rows,), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "vocab_size"), [(1, 1), (3, 48), (17, 200), (5, 3584)])
def test_losses_and_gradient_are_torchs(rows: int, vocab_size: int, dtype: torch.dtype) -> None:
    logits, targets = _inputs(rows, vocab_size, dtype)
    wide = logits.float().clone().requires_grad_()
    expected = F.cross_entropy(wide, targets, reduction="none")
    expected.sum().backward()
    assert torch.equal(cross_entropy(logits, targets), expected)
    losses = cross_entropy_and_grad_(logits, targets)
    assert losses.dtype == torch.float32
    if dtype == torch.float32:  # computed in place: another order of the operations
        torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    else:
        assert torch.equal(losses, expected)
    # A float16 gradient under 6e-8 is zero.
    torch.testing.assert_close(logits.float(), wide.grad, rtol=HALF.get(dtype, 1e-5), atol=1e-7)


@pytest.mark.parametrize("scale", [0.125, torch.tensor([0.125]), torch.tensor(0.125)])
def test_scale_multiplies_the_gradient_and_not_the_losses(scale: torch.Tensor | float) -> None:
    logits, targets = _inputs(7, 96)
    plain, scaled = logits.clone(), logits.clone()
    losses = cross_entropy_and_grad_(plain, targets)
    assert torch.equal(cross_entropy_and_grad_(scaled, targets, scale), losses)
    assert torch.equal(scaled, plain * 0.125)


def test_ignored_rows_count_for_nothing_and_impossible_targets_for_nan() -> None:
    logits, targets = _inputs(4, 48)
    targets[1], targets[2] = IGNORED, 48
    losses = cross_entropy_and_grad_(logits, targets)
    assert losses[1] == 0
    assert not logits[1].any()
    assert losses.isnan().tolist() == [False, False, True, False]
    assert cross_entropy(logits, targets).isnan().tolist() == [False, False, True, False]


def test_hopeless_and_certain_rows_stay_finite() -> None:
    """A target of probability 1e-40 has a loss of 92, not infinity; a certain one has loss and gradient 0."""
    logits = torch.tensor([[92.0, 0.0], [0.0, 500.0], [-torch.inf, 1.0]])
    losses = cross_entropy_and_grad_(logits, torch.tensor([1, 1, 1]))
    assert losses.tolist() == [92.0, 0.0, 0.0]
    assert logits[0].tolist() == [1.0, -1.0]
    assert not logits[1:].any()


def test_rows_apart_from_each_other_are_rewritten_where_they_lie() -> None:
    whole = torch.full((5, 64), 7.0)
    logits, targets = _inputs(5, 50)
    whole[:, :50] = logits
    losses = cross_entropy_and_grad_(whole[:, :50], targets)
    assert torch.equal(losses, cross_entropy_and_grad_(logits, targets))
    assert torch.equal(whole[:, :50], logits)
    assert (whole[:, 50:] == 7).all()


KERNEL = """
from functools import partial
import torch
from tunesmith.kernels.cross_entropy import IGNORED, cross_entropy_and_grad_reference_, cross_entropy_reference
from tunesmith.kernels import cross_entropy_triton
from tunesmith.kernels.cross_entropy_triton import cross_entropy_and_grad_operator, cross_entropy_operator

float32, float16, bfloat16 = torch.float32, torch.float16, torch.bfloat16
close = partial(torch.testing.assert_close, equal_nan=True)
generator = torch.Generator().manual_seed(0)
# The first takes one tile, of the size they have. With smaller ones two whole tiles are the last but one, and two and a
# part the last. The interpreter cuts bfloat16 off where a GPU rounds it: one unit in the last place.
shapes = [(3, 3584), (1, 1), (3, 48), (5, 200), (3, 512), (3, 512 + 40)]
for rows, vocab_size in shapes:
    for dtype, rtol in ((float32, 2e-6), (float16, 2**-10), (bfloat16, 2**-7))[: None if vocab_size > 500 else 1]:
        whole = (torch.randn(rows, vocab_size + 8, generator=generator) * 4).to(dtype)
        logits = whole[:, :vocab_size]
        targets = torch.randint(0, vocab_size, (rows,), generator=generator)
        if rows > 1:
            targets[0], targets[1] = vocab_size - 1, IGNORED
        if rows > 2:
            targets[2] = 10**6
            logits[2, : vocab_size // 2] = -torch.inf
        truth = logits.clone()
        for scale in (None, torch.tensor([0.3])):
            factor = 1.0 if scale is not None else 2.5
            truth, mine = logits.clone(), whole.clone()[:, :vocab_size]
            assert mine.stride(0) == vocab_size + 8
            expected = cross_entropy_and_grad_reference_(truth, targets, scale if scale is not None else factor)
            close(cross_entropy_operator(mine, targets, IGNORED), expected, rtol=2e-6, atol=2e-6)
            losses = cross_entropy_and_grad_operator(mine, targets, IGNORED, factor, scale)
            close(losses, expected, rtol=2e-6, atol=2e-6)
            possible = targets < vocab_size
            close(mine[possible], truth[possible], rtol=rtol, atol=1e-6 if dtype == float32 else 1e-7)
            if rows > 1:
                assert not mine[1].any()
    cross_entropy_triton._MOST_LANES = 32
bad = torch.tensor([[1.0, float("nan"), 0.0], [float("inf"), 0.0, 0.0]])
assert cross_entropy_operator(bad, torch.tensor([0, 0]), IGNORED).isnan().all()
empty = torch.empty(0, 5)
assert cross_entropy_and_grad_operator(empty, torch.empty(0, dtype=torch.int64), IGNORED, 1.0, None).shape == (0,)
logits, targets, scale = torch.randn(3, 20), torch.tensor([1, 2, 3]), torch.tensor([2.0])
tests = ("test_schema", "test_faketensor")
torch.library.opcheck(cross_entropy_operator, (logits, targets, IGNORED), test_utils=tests)
torch.library.opcheck(cross_entropy_and_grad_operator, (logits, targets, IGNORED, 1.0, scale), test_utils=tests)
"""


def test_kernel_equals_the_reference_under_tritons_interpreter(check_interpreted: Callable[[str], None]) -> None:
    check_interpreted(KERNEL)


@pytest.mark.parametrize("vocab_size", [50257])
def test_kernel_compiles_for_every_chip(vocab_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU; whole tiles of 16-bit logits in 16 bytes at a time, in an odd vocabulary too."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tunesmith.kernels.cross_entropy_triton import cross_entropy_kernel, launch_shape

    if not hasattr(cross_entropy_kernel, "cache_key"):
        pytest.skip("Triton interprets here (TRITON_INTERPRET): nothing is compiled")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    lanes, warps = launch_shape(vocab_size)
    constants = {"HAS_SCALE": 1, "GRADIENT": 1, "IGNORED": IGNORED, "LANES": lanes, "WIDTH": 8}
    types = {"logits": "*bf16", "targets": "*i64", "scale": "*fp32", "losses": "*fp32", "factor": "fp32"}
    names = list(cross_entropy_kernel.arg_names)
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = ["logits", "row_stride", *(["vocab_size"] if vocab_size % 16 == 0 else [])]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    fixed = {(names.index(name),): value for name, value in constants.items()}
    for chip in (80, 86, 89, 90, 100, 120):
        source = ASTSource(cross_entropy_kernel, signature, fixed, attributes)
        options = {"num_warps": warps, "enable_fp_fusion": True}
        compiled = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
        assert compiled.metadata.shared <= 1024
        wide = re.findall(r"(ld|st)\.global\.v4\.b32", compiled.asm["ptx"])
        loads_a_pass = lanes // warps // 32
        assert wide.count("ld") >= 2 * loads_a_pass, chip
        assert wide.count("st") >= loads_a_pass, chip
