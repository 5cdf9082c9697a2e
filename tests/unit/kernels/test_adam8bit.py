"""8-bit AdamW's codebook, its quantisation, and its Triton kernel against the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tunesmith.kernels import adam8bit
from tunesmith.kernels.adam8bit import dequantise_blocks, quantise_blocks, update
from tunesmith.kernels.adam8bit_moments import BLOCK, AdamSettings, Moments, dynamic_codebook


@pytest.mark.parametrize("signed", [True, False])
def test_codebook_has_256_ascending_values(signed: bool) -> None:
    book = dynamic_codebook(signed)
    assert book.shape == (256,)
    assert (book[1:] > book[:-1]).all()
    assert book[-1] == 1
    assert 0.0 in book
    assert (book[0] < -0.99) if signed else (book[0] == 0)


@pytest.mark.parametrize("signed", [True, False])
def test_codebook_is_that_of_bitsandbytes(signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.testing.assert_close(dynamic_codebook(signed), functional.create_dynamic_map(signed), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("count", [1, BLOCK, BLOCK + 1, 5 * BLOCK + 17])
def test_quantisation_picks_the_nearest_code(count: int) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(count))
    book = dynamic_codebook(True)
    codes, absmax = quantise_blocks(values, book)
    assert codes.shape == (count,)
    assert absmax.shape == (-(-count // BLOCK),)
    scaled = values / absmax.repeat_interleave(BLOCK)[:count]
    best = (scaled[:, None] - book).abs().amin(dim=1)
    ours = (scaled - book[codes.int()]).abs()
    torch.testing.assert_close(ours, best, rtol=0, atol=1e-6)
    # The widest gap of the signed book is 0.9/64 of the block's largest value; half of it is the worst error.
    error = (dequantise_blocks(codes, absmax, book) - values).abs() / absmax.repeat_interleave(BLOCK)[:count]
    assert error.max() <= 0.9 / 64 / 2 + 1e-6


def test_zeros_stay_zeros() -> None:
    codes, absmax = quantise_blocks(torch.zeros(300), dynamic_codebook(True))
    assert not dequantise_blocks(codes, absmax, dynamic_codebook(True)).any()


def _moments(count: int) -> Moments:
    blocks = -(-count // BLOCK)
    codes = torch.zeros(count, dtype=torch.uint8)
    return Moments(codes + 127, torch.zeros(blocks), codes, torch.zeros(blocks))


def test_slices_change_nothing_and_a_stopped_update_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    start, grad = torch.randn(10 * BLOCK + 5, generator=generator), torch.randn(10 * BLOCK + 5, generator=generator)
    settings = AdamSettings(1, 1e-2, (0.9, 0.99), 1e-8, 0.1)
    go, stop, divisor = torch.zeros(()), torch.ones(()), torch.tensor(3.0)
    whole, pieces = start.clone(), start.clone()
    of_whole, of_pieces = _moments(len(start)), _moments(len(start))
    update(whole, grad, of_whole, settings, divisor, go)
    monkeypatch.setattr(adam8bit, "SLICE", 4 * BLOCK)
    update(pieces, grad, of_pieces, settings, divisor, go)
    assert torch.equal(whole, pieces)
    for name in vars(of_whole):
        assert torch.equal(getattr(of_whole, name), getattr(of_pieces, name))
    update(pieces, grad, of_pieces, settings, divisor, stop)
    assert torch.equal(whole, pieces)


KERNEL = """
import torch
import triton
import triton.language as tl
from tunesmith.kernels.adam8bit import update_reference
from tunesmith.kernels.adam8bit_moments import BLOCK, AdamSettings, Moments, dynamic_codebook, midpoints_on
from tunesmith.kernels import adam8bit_triton
from tunesmith.kernels.adam8bit_triton import _nearest_code, update_kernel, update_operator

CPU = torch.device("cpu")


@triton.jit
def nearest(values, middles, out, SIZE: tl.constexpr, SIGNED: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(out + index, _nearest_code(tl.load(values + index), middles, SIGNED))


# Every code, every midpoint and its neighbours, the ends of the decades, and values between.
for signed in (True, False):
    middles, book = midpoints_on(signed, CPU), dynamic_codebook(signed)
    edges = torch.tensor([10.0**-k for k in range(9)])
    points = torch.cat([book, middles, edges, torch.logspace(-9, 0, 3000)])
    if signed:
        points = torch.cat([points, -edges, -torch.logspace(-9, 0, 3000)])
    beside = [torch.nextafter(points, torch.tensor(end)) for end in (2.0, -2.0)]
    points = torch.cat([points, *beside])
    points = points[(points <= 1) & (points >= (-1 if signed else 0))]
    size = 1 << len(points).bit_length()
    points = torch.nn.functional.pad(points, (0, size - len(points)))
    out = torch.empty(size, dtype=torch.int32)
    nearest[(1,)](points, middles, out, SIZE=size, SIGNED=signed)
    assert torch.equal(out, torch.bucketize(points, middles, out_int32=True)), signed


def moments(count):
    blocks = -(-count // BLOCK)
    codes = torch.zeros(count, dtype=torch.uint8)
    return Moments(codes + 127, torch.zeros(blocks), codes.clone(), torch.zeros(blocks))


def copies(held):
    return Moments(*(tensor.clone() for tensor in vars(held).values()))


generator = torch.Generator().manual_seed(0)
go, stop = torch.zeros(()), torch.ones(())
# The first as it is launched, with four blocks a program; then two, of which the last sizes take three programs.
assert adam8bit_triton.BLOCKS == 4
full, cases = torch.float32, []
cases += [(count, full, 2) for count in (4 * BLOCK + 17, 1, 256, 257, 2 * BLOCK)] + [(5 * BLOCK + 17, full, 3)]
cases += [(5 * BLOCK + 17, dtype, 3) for dtype in (torch.bfloat16, torch.float16)] + [(3, torch.bfloat16, 2)]
for count, dtype, steps in cases:
    weight = torch.randn(count, generator=generator).to(dtype)
    held = moments(count)
    for number in range(1, steps + 1):
        spread = 10.0 ** (4 * torch.rand(count, generator=generator) - 4)
        grad = (torch.randn(count, generator=generator) * spread).to(dtype)
        settings = AdamSettings(number, 1e-2, (0.9, 0.999), 1e-8, 0.1)
        divisor = torch.tensor(2.5)
        mine, mine_held = weight.clone(), copies(held)
        if number == 2:
            update_kernel(mine, grad, mine_held, settings, divisor, stop)
            assert torch.equal(mine, weight)
            assert all(torch.equal(a, b) for a, b in zip(vars(mine_held).values(), vars(held).values(), strict=True))
        update_kernel(mine, grad, mine_held, settings, divisor, go)
        update_reference(weight, grad, held, settings, divisor, go)
        # The interpreter cuts bfloat16 off where a GPU rounds it: one unit in the last place.
        rtol = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
        torch.testing.assert_close(mine, weight, rtol=rtol, atol=1e-6)
        torch.testing.assert_close(mine_held.mean_absmax, held.mean_absmax, rtol=1e-5, atol=0)
        torch.testing.assert_close(mine_held.square_absmax, held.square_absmax, rtol=1e-5, atol=0)
        for name in ("mean_codes", "square_codes"):
            off = (getattr(mine_held, name).int() - getattr(held, name).int()).abs()
            assert off.max() <= 1 and (off > 0).float().mean() < 0.01, (count, dtype, name)  # ties within rounding
        weight, held = mine, mine_held
    adam8bit_triton.BLOCKS = 2

tensors = [torch.randn(300), torch.randn(300), *vars(moments(300)).values(), torch.ones(()), go]
arguments = (*tensors, 1e-2, 1.0, [0.9, 0.999], [0.1, 0.001], 1e-8)
torch.library.opcheck(update_operator, arguments, test_utils=("test_schema", "test_faketensor"))
"""


def test_kernel_equals_the_reference_under_tritons_interpreter(check_interpreted: Callable[[str], None]) -> None:
    check_interpreted(KERNEL)


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_it_compiles_for_every_chip(capability: int) -> None:
    """Without a GPU, for bfloat16 weights; the sums of a block are all the shared memory it takes."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tunesmith.kernels.adam8bit_triton import BLOCKS, _update_kernel

    signature = dict.fromkeys(_update_kernel.arg_names, "*fp32")
    signature.update(parameter="*bf16", grad="*bf16", mean_codes="*u8", square_codes="*u8", count="i64")
    numbers = ("learning_rate", "decay", "beta1", "beta2", "rest1", "rest2", "correction1", "correction2", "eps")
    signature.update(dict.fromkeys(numbers, "fp32"), BLOCK="constexpr", BLOCKS="constexpr")
    source = ASTSource(fn=_update_kernel, signature=signature, constexprs={"BLOCK": BLOCK, "BLOCKS": BLOCKS})
    options = {"num_warps": 4, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.metadata.shared <= 1024
