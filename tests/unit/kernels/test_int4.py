"""int4 weights: packing, rounding, the search for ranges, and products on a CPU."""

from __future__ import annotations

import pytest
import torch

from tunesmith.kernels.gemv import int4_product
from tunesmith.kernels.int4 import (
    dequantize_int4,
    empty_int4,
    pack_words,
    padded_width,
    quantize_int4,
    unpack_words,
)
from tunesmith.kernels.int4_cpu import pack_for_cpu

CASES = [(group, symmetric) for group in (128, 64, 32) for symmetric in (False, True)]


def random(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def test_words_hold_the_columns_that_the_module_draws() -> None:
    codes = torch.zeros(1, 256, dtype=torch.uint8)
    codes[0, 128 + 16 * 5 + 3] = 9  # block 1, plane 5, word 3
    words = pack_words(codes)
    assert words.shape == (1, 32)
    assert words[0, 16 + 3] == 9 << 20
    assert int(words.count_nonzero()) == 1


@pytest.mark.parametrize("width", [1, 40, 128, 300])
def test_unpacking_undoes_packing(width: int) -> None:
    codes = torch.randint(0, 16, (5, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack_words(pack_words(codes), width), codes)
    assert padded_width(width) % 128 == 0


@pytest.mark.parametrize(("group", "symmetric"), CASES)
def test_without_clipping_the_error_is_half_a_step(group: int, symmetric: bool) -> None:
    weight = random(6, 200)
    held = quantize_int4(weight, group, symmetric, clips=(1.0,))
    step = held.scales.float().repeat_interleave(group, 1)[:, :200]
    # A symmetric range is one step shorter above than below.
    allowed = 1.001 if symmetric else 0.51
    assert ((dequantize_int4(held) - weight).abs() <= allowed * step).all()
    assert held.group_size == group
    assert (held.zeros is None) == symmetric


@pytest.mark.parametrize(("group", "symmetric"), CASES)
def test_the_search_never_makes_a_group_worse(group: int, symmetric: bool) -> None:
    weight = random(8, 256)
    weight[:, 5] *= 6  # an outlier, which a smaller range gives up
    errors = [
        (dequantize_int4(quantize_int4(weight, group, symmetric, clips=clips)) - weight).view(8, -1, group).norm(dim=-1)
        for clips in ((1.0,), (1.0, 0.9, 0.8))
    ]
    assert (errors[1] <= errors[0] + 1e-6).all()
    assert errors[1].sum() < errors[0].sum()


def test_zeros_and_small_groups_come_back_exactly() -> None:
    held = quantize_int4(torch.zeros(3, 128), 32)
    assert torch.equal(dequantize_int4(held), torch.zeros(3, 128))
    weight = torch.arange(16.0).repeat(2, 8) - 5
    assert torch.equal(dequantize_int4(quantize_int4(weight, 128, clips=(1.0,))), weight)


@pytest.mark.parametrize(("group", "symmetric"), CASES)
@pytest.mark.parametrize(("rows", "width", "tokens"), [(48, 256, 1), (21, 200, 3), (16, 128, 70)])
def test_products_equal_the_dequantised_weight(group: int, symmetric: bool, rows: int, width: int, tokens: int) -> None:
    held, x, bias = quantize_int4(random(rows, width), group, symmetric), random(tokens, width, 1), random(1, rows)[0]
    truth = x.double() @ dequantize_int4(held).double().t() + bias.double()
    for cpu in (None, pack_for_cpu(held)):
        mine = int4_product(x, held, bias, cpu)
        assert float((mine.double() - truth).norm() / truth.norm()) < 6e-3


def test_a_group_that_cannot_be_packed_is_refused() -> None:
    with pytest.raises(ValueError, match="128, 64, 32 columns, got 16"):
        quantize_int4(torch.zeros(2, 128), 16)


def test_meta_weights_have_a_shape_and_no_storage() -> None:
    held = empty_int4((8, 200), torch.bfloat16, 64, False, device="meta")
    assert held.words.is_meta
    assert held.num_bytes == 8 * (256 // 2 + 4 * 2 + 4)
