"""Dropout from a counter: the generator against published numbers, the mask's statistics, the kernel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tunesmith.kernels import philox as module
from tunesmith.kernels.dropout import Noise, add_dropout_, dropout, kept
from tunesmith.kernels.philox import philox


def noise(seed: int = 1, first_row: int = 0) -> Noise:
    return Noise(torch.tensor([seed]), first_row)


@pytest.mark.parametrize(
    ("rounds", "counter", "seed", "words"),
    [
        (7, (0, 0, 0), 0, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (10, (0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ],
)
def test_known_answers(
    rounds: int, counter: tuple[int, int, int], seed: int, words: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vectors that the generator's authors publish with their implementation, for zero counter and key."""
    monkeypatch.setattr(module, "ROUNDS", rounds)
    c0, c1, site = counter
    found = philox(torch.tensor([c0]), torch.tensor([c1]), site, torch.tensor([seed]))
    assert tuple(int(word) for word in found) == words


@pytest.mark.parametrize("probability", [0.0, 0.05, 0.5, 0.9])
def test_kept_ratio_and_mean(probability: float) -> None:
    mask = kept(512, 399, noise(), 3, probability)
    num = mask.numel()
    assert (
        abs(float(mask.float().mean()) - (1 - probability)) < 5 * (probability * (1 - probability) / num) ** 0.5 + 1e-9
    )
    x = torch.ones(512, 399)
    assert float(dropout(x, noise(), 3, probability).mean()) == pytest.approx(1, abs=0.03)
    if probability == 0:
        assert torch.equal(dropout(x, noise(), 3, 0.0), x)


def test_masks_differ_between_seeds_sites_and_rows_and_not_otherwise() -> None:
    mask = kept(32, 64, noise(7), 2, 0.5)
    assert torch.equal(mask, kept(32, 64, noise(7), 2, 0.5))
    for other in (
        kept(32, 64, noise(8), 2, 0.5),
        kept(32, 64, noise(7 + 2**40), 2, 0.5),
        kept(32, 64, noise(7), 3, 0.5),
    ):
        # Independent masks of a half agree in a half of their 2048 places, give or take 5 deviations of 22.6.
        assert abs(int((mask == other).sum()) - 1024) < 113
    rows = mask.float() @ mask.float().t()
    assert float((rows - torch.diag(rows.diag())).max()) < 32  # no two rows are the same


def test_parts_of_the_rows_have_their_place() -> None:
    whole = kept(20, 50, noise(), 1, 0.3)
    assert torch.equal(whole[13:], kept(7, 50, noise().after(5).after(8), 1, 0.3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_added_and_rounded_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, out = (torch.randn(9, 30, generator=generator).to(dtype) for _ in range(2))
    expected = (out.float() + x.float() * kept(9, 30, noise(), 0, 0.25) / 0.75).to(dtype)
    add_dropout_(out, x, noise(), 0, 0.25)
    torch.testing.assert_close(out, expected, rtol=1e-6 if dtype == torch.float32 else 0, atol=1e-6)


def test_a_probability_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="below 1, got 1"):
        dropout(torch.ones(1, 4), noise(), 0, 1.0)


KERNEL = """
import torch
from tunesmith.kernels.dropout import Noise, add_dropout_reference_, dropout_reference, threshold_of
from tunesmith.kernels import dropout_triton
from tunesmith.kernels.dropout_triton import add_dropout_operator, dropout_operator

generator = torch.Generator().manual_seed(0)
# The interpreter cuts bfloat16 off where a GPU rounds it.
tolerance = {torch.float32: 1e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}
# Strips of at most 64 columns: the widest rows take three, the last with columns missing.
dropout_triton._COLUMNS, dropout_triton._COLUMNS_PER_WARP = 64, 16
shapes = [(1, 1), (3, 48), (2, 97), (3, 600)]
for dtype, limit in tolerance.items():
    for rows, width in shapes if dtype == torch.float32 else shapes[2:]:
        for probability in (0.05, 0.7):
            x = torch.randn(rows, width + 3, generator=generator).to(dtype)[:, :width]
            noise, site = Noise(torch.tensor([2**40 + 12345]), 5), 9
            arguments = (noise.seed, site, 5, threshold_of(probability), 1 / (1 - probability))
            mine, truth = dropout_operator(x, *arguments), dropout_reference(x, noise, site, probability)
            assert torch.equal(mine == 0, truth == 0)
            torch.testing.assert_close(mine, truth, rtol=limit, atol=limit)
            out = torch.randn(rows, width, generator=generator).to(dtype)
            expected = out.clone()
            add_dropout_reference_(expected, x, noise, site, probability)
            add_dropout_operator(out, x, *arguments)
            torch.testing.assert_close(out, expected, rtol=limit, atol=2 * limit)
assert dropout_operator(x[:0], *arguments).shape == (0, 600)
x = torch.randn(3, 8)
torch.library.opcheck(dropout_operator, (x, *arguments), test_utils=("test_schema", "test_faketensor"))
torch.library.opcheck(add_dropout_operator, (x.clone(), x, *arguments), test_utils=("test_schema", "test_faketensor"))
"""


def test_kernel_equals_the_reference_under_tritons_interpreter(check_interpreted: Callable[[str], None]) -> None:
    check_interpreted(KERNEL)


@pytest.mark.parametrize("chip", [80, 86, 89, 90, 100, 120])
def test_compiles_for_every_chip(chip: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tunesmith.kernels.dropout_triton import _dropout_kernel, strip

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    if not hasattr(_dropout_kernel, "cache_key"):
        pytest.skip("Triton interprets here (TRITON_INTERPRET): nothing is compiled")
    columns, warps = strip(896)
    types = {"x": "*bf16", "seed": "*i64", "out": "*bf16", "scale": "fp32"}
    types |= dict.fromkeys(("x_stride", "out_stride", "site", "first_row", "threshold"), "i32")
    constants = {"WIDTH": 3584, "QUARTER": 896, "COLUMNS": columns, "ADD": 1, "ROUNDS": 7, "SHIFT": 1}
    names = list(_dropout_kernel.arg_names)
    aligned = ("x", "out", "x_stride", "out_stride")
    source = ASTSource(
        _dropout_kernel,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": warps, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    assert f".target sm_{chip}" in compiled.asm["ptx"]
    assert "ld.global.v4.b32" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 48 * 1024
