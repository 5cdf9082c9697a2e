"""Our NF4 against bitsandbytes on the CPU: every code, every scale of both levels, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tunesmith.kernels.codebooks import dynamic_values, nf4_values
from tunesmith.kernels.nf4 import dequantize_nf4, plain_scales, quantize_nf4

CPU = torch.device("cpu")
SHAPES = [(128, 256), (300, 192), (64, 64), (3, 5), (1, 1), (13, 17), (5, 64), (77, 130), (513, 64), (2, 8192)]


@pytest.fixture(scope="module")
def theirs() -> Any:
    return pytest.importorskip("bitsandbytes.functional")


def test_tables(theirs: Any) -> None:
    assert torch.equal(nf4_values(CPU), theirs.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(dynamic_values(CPU), theirs.create_dynamic_map())
    unsigned = theirs.create_dynamic_map(signed=False)
    assert torch.equal(dynamic_values(CPU, False), unsigned)


def weights(shape: tuple[int, int], kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(shape[0] * 8191 + shape[1])
    weight = torch.randn(shape, generator=generator)
    if kind == "tiny":
        return weight * 1e-30
    if kind == "huge":
        return weight * 1e4
    if kind == "zero":
        return torch.zeros(shape)
    if kind == "holes":
        flat = weight.view(-1)
        flat[: min(200, flat.numel())] = 0
        return flat.view(shape)
    if kind == "ties":
        grid = torch.cat([nf4_values(CPU), (nf4_values(CPU)[1:] + nf4_values(CPU)[:-1]) / 2])
        return grid[torch.randint(31, shape, generator=generator)]
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["normal", "tiny", "huge", "zero", "holes", "ties"])
@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
def test_codes_and_scales(theirs: Any, dtype: torch.dtype, kind: str, double: bool) -> None:
    for shape in SHAPES:
        weight = weights(shape, kind).to(dtype)
        codes, state = theirs.quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
        mine = quantize_nf4(weight, double)
        assert torch.equal(mine.codes.view(-1), codes.view(-1)), (shape, "codes")
        assert torch.equal(mine.scales, state.absmax), (shape, "scales")
        if double:
            assert mine.scale_scales is not None and mine.offset is not None
            assert torch.equal(mine.scale_scales, state.state2.absmax), (shape, "scales of scales")
            assert torch.equal(mine.offset, state.offset), (shape, "offset")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
def test_dequantised(theirs: Any, dtype: torch.dtype, double: bool) -> None:
    """Widths that are multiples of 64 only: for others bitsandbytes 0.50's AVX-512 kernel reads wrong scales."""
    for shape in [(128, 256), (300, 192), (64, 64), (5, 64), (2, 8192)]:
        weight = weights(shape, "normal").to(dtype)
        codes, state = theirs.quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
        expected = theirs.dequantize_4bit(codes, state)
        mine = quantize_nf4(weight, double)
        assert torch.equal(dequantize_nf4(mine), expected), shape
        if double:
            scales = theirs.dequantize_blockwise(state.absmax, state.state2) + state.offset
            assert torch.equal(plain_scales(mine), scales)


def test_many_scales_around_every_threshold(theirs: Any) -> None:
    """The second level alone: scales spread evenly, so that its codes and every step of its grid are met."""
    scales = torch.linspace(0, 1, 64 * 256).view(-1, 1)
    weight = torch.ones(1, 64) * scales
    _, state = theirs.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    mine = quantize_nf4(weight, True)
    assert torch.equal(mine.scales, state.absmax)
    assert len(mine.scales.unique()) > 150
