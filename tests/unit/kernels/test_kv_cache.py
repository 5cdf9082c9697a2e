"""Writing into pages: against plain indexing, and fp8's scales against what they promise."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tunesmith.kernels.fp8_weight import FP8
from tunesmith.kernels.kv_cache import write_kv
from tunesmith.kernels.kv_cache_scale import SMALLEST_SCALE, power_of_two_scale

PAGES, SLOTS, HEADS, HEAD_DIM = 6, 16, 2, 8


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_go_to_their_slots_and_padding_nowhere(dtype: torch.dtype) -> None:
    fused = random(5, 3 * HEADS, HEAD_DIM).to(dtype)
    key, value = fused[:, HEADS : 2 * HEADS], fused[:, 2 * HEADS :]
    keys = random(PAGES, SLOTS, HEADS, HEAD_DIM, seed=1).to(dtype)
    values = random(PAGES, SLOTS, HEADS, HEAD_DIM, seed=2).to(dtype)
    before = keys.clone(), values.clone()
    slots = torch.tensor([3 * SLOTS + 15, -1, 5 * SLOTS, 5 * SLOTS + 1, -1])
    write_kv(key, value, keys, values, slots)
    for new, pages, old in ((key, keys, before[0]), (value, values, before[1])):
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                old[slot // SLOTS, slot % SLOTS] = new[token]
        assert torch.equal(pages, old)


def test_scales_are_the_least_powers_of_two_that_hold() -> None:
    largest = torch.tensor([0.0, 1e-38, 1.0, 447.0, 448.0, 448.5, 1.75, math.nextafter(1.75, 2) + 1e-6, 3e38])
    scale = power_of_two_scale(largest)
    assert scale[0] == SMALLEST_SCALE
    assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))
    assert bool((largest <= 448 * scale.double()).all())
    least = scale > SMALLEST_SCALE
    assert bool((largest[least] > 224 * scale[least].double()).all())


def pages_of_fp8() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pages and scales full of what others left."""
    codes = [torch.full((PAGES, SLOTS, HEADS, HEAD_DIM), 448.0).to(FP8) for _ in range(2)]
    return codes[0], codes[1], torch.full((PAGES, HEADS), 2.0**30), torch.full((PAGES, HEADS), 2.0**30)


def write_in_parts(new: Tensor, slots: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    keys, values, key_scales, value_scales = pages_of_fp8()
    for part, where in zip(new.split(lengths), slots.split(lengths), strict=True):
        write_kv(part, 2 * part, keys, values, where, key_scales, value_scales)
    assert torch.equal(value_scales[slots // SLOTS], 2 * key_scales[slots // SLOTS])
    return keys, key_scales


@pytest.mark.parametrize("lengths", [[40], [1] * 40, [16, 1, 7, 16], [13, 27]])
def test_fp8_keeps_three_bits_however_the_tokens_come(lengths: list[int]) -> None:
    """Magnitudes grow along the tokens, so pages move to larger scales while they fill."""
    new = random(40, HEADS, HEAD_DIM) * torch.logspace(-3, 3, 40)[:, None, None]
    slots = torch.arange(40) + 2 * SLOTS
    keys, scales = write_in_parts(new, slots, lengths)
    held = (keys.float() * scales[:, None, :, None]).flatten(0, 1)[slots]
    step = scales[slots // SLOTS][..., None] * 2.0**-9
    assert bool(((held - new).abs() <= new.abs() / 16 + step).all())
    at_once, scales_at_once = write_in_parts(new, slots, [40])
    assert torch.equal(scales[2:5], scales_at_once[2:5])
    # Only what is below fp8's normal numbers may have been rounded twice.
    normal = (new / scales[slots // SLOTS][..., None]).abs() >= 2.0**-6
    assert torch.equal(keys.float().flatten(0, 1)[slots][normal], at_once.float().flatten(0, 1)[slots][normal])


def test_a_page_begun_anew_forgets_its_scale_and_a_page_going_on_keeps_it() -> None:
    keys, values, key_scales, value_scales = pages_of_fp8()
    small = torch.full((1, HEADS, HEAD_DIM), 1.0)
    write_kv(small, small, keys, values, torch.tensor([SLOTS]), key_scales, value_scales)
    assert key_scales[1].tolist() == [2.0**-8] * HEADS
    assert key_scales[2].tolist() == [2.0**30] * HEADS
    write_kv(8 * small, 8 * small, keys, values, torch.tensor([SLOTS + 1]), key_scales, value_scales)
    write_kv(small, small, keys, values, torch.tensor([SLOTS + 2]), key_scales, value_scales)
    assert key_scales[1].tolist() == [2.0**-5] * HEADS
    held = keys[1, :3].float() * key_scales[1][None, :, None]
    assert held[:, 0, 0].tolist() == [1.0, 8.0, 1.0]


KERNELS = """
from tunesmith.kernels.kv_cache import write_kv_reference
from tunesmith.kernels.kv_cache_triton import write_kv_operator

generator = torch.Generator().manual_seed(0)
def both(dtype, scaled, batches, heads=3, width=24):
    pages = [torch.zeros(6, 16, heads, width).to(dtype) for _ in range(2)]
    scales = [torch.full((6, heads), 2.0**30) for _ in range(2)] if scaled else [None, None]
    mine, truth = ([None if t is None else t.clone() for t in (*pages, *scales)] for _ in range(2))
    for number, slots in enumerate(batches):
        fused = torch.randn(len(slots), 3 * heads, width, generator=generator) * 8.0**number
        key, value = fused[:, :heads], fused[:, heads : 2 * heads].transpose(1, 2).contiguous().transpose(1, 2)
        slots = torch.tensor(slots)
        write_kv_operator(key, value, *mine[:2], slots, *mine[2:])
        write_kv_reference(key, value, *truth[:2], slots, *truth[2:])
    for one, other in zip(mine, truth):
        assert one is None or torch.equal(one.float(), other.float()), (one.float() - other.float()).abs().max()
    return key, value, *mine[:2], slots, *mine[2:]
batches = [[32, 33, 34, -1], [35, 16, 17], [*range(36, 48), *range(80, 96), *range(0, 7), 18], [7, -1, -1, 19]]
arguments = both(torch.float32, False, batches)
both(torch.float8_e4m3fn, True, batches)
torch.library.opcheck(write_kv_operator, arguments, test_utils=("test_schema", "test_faketensor"))
"""


def test_kernels_equal_the_reference_under_tritons_interpreter(check_interpreted_fp8: Callable[[str], None]) -> None:
    check_interpreted_fp8(KERNELS)
