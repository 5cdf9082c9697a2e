"""The kernels of kernels/x_bytes.py, as torch custom operators. Imported only where Triton is installed.

They begin while the kernel before them ends, and let the next begin, which asks for its weights meanwhile.
"""

# Triton's decorator and its kernels' arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, operator, index, misc"
# Tuples grow in Triton's loops, and Triton knows no starred ones.
# ruff: noqa: RUF005

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tunesmith.kernels.int4_layout import BLOCK
from tunesmith.kernels.jit import jit
from tunesmith.kernels.launch import current, in_rows, overlaps
from tunesmith.kernels.quick import quick
from tunesmith.kernels.x_bytes_layout import BLOCK_WORDS, LARGEST_CODE, SCALE_AT, SMALLEST_SCALE
from tunesmith.units import ceil_div

# Blocks of a program where blocks are on their own, a warp for each: few tokens are waited for. Of SwiGLU that is 320
# instructions of a warp, with one warp for four blocks 744 (SASS of sm_90).
_BLOCKS = 4
# Blocks of a warp where a program has a whole row.
_BLOCKS_PER_WARP = 4
_EARLY = tl.constexpr("griddepcontrol.launch_dependents; griddepcontrol.wait; mov.b32 $0, $1;")
_BLOCK, _WORDS = tl.constexpr(BLOCK), tl.constexpr(BLOCK_WORDS)
_SCALE_AT = tl.constexpr(SCALE_AT)
_INVERSE, _SMALLEST = tl.constexpr(1 / LARGEST_CODE), tl.constexpr(SMALLEST_SCALE)


@torch.library.custom_op("tunesmith::x_bytes", mutates_args=())
def x_bytes_operator(x: Tensor) -> Tensor:
    """Blocks int32 [T, D / 128, 72] of x [T, D]."""
    source = in_rows(x)
    return _by_blocks(source, source.shape[1], is_gated=False)


@x_bytes_operator.register_fake
def _x_bytes_fake(x: Tensor) -> Tensor:
    return _blocks_like(x, x.shape[1])


@torch.library.custom_op("tunesmith::swiglu_bytes", mutates_args=())
def swiglu_bytes_operator(gate_up: Tensor) -> Tensor:
    """Blocks int32 [T, I / 128, 72] of silu(gate) * up, gate_up [T, 2 I]."""
    source = in_rows(gate_up)
    return _by_blocks(source, source.shape[1] // 2, is_gated=True)


@swiglu_bytes_operator.register_fake
def _swiglu_bytes_fake(gate_up: Tensor) -> Tensor:
    return _blocks_like(gate_up, gate_up.shape[1] // 2)


@torch.library.custom_op("tunesmith::add_rms_norm_bytes_", mutates_args=("stream",))
def add_rms_norm_bytes_operator(stream: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Blocks int32 [T, D / 128, 72] of the normed rows; the stream [T, D] becomes stream + delta."""
    num_rows, width = stream.shape
    out = _blocks_like(stream, width)
    if num_rows:
        blocks = triton.next_power_of_2(width // BLOCK)
        overlap = {"launch_pdl": True} if overlaps(stream.device) else {}
        with current(stream.device):
            quick(_norm_kernel)[(num_rows,)](
                stream,
                delta,
                weight.contiguous(),
                out,
                eps,
                WIDTH=width,
                BLOCKS=blocks,
                OVERLAP=bool(overlap),
                num_warps=max(1, min(16, blocks // _BLOCKS_PER_WARP)),
                enable_fp_fusion=False,  # rounds as plain torch does
                **overlap,
            )
    return out


@add_rms_norm_bytes_operator.register_fake
def _add_rms_norm_bytes_fake(stream: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _blocks_like(stream, stream.shape[1])


def _blocks_like(x: Tensor, width: int) -> Tensor:
    return x.new_empty(x.shape[0], width // BLOCK, BLOCK_WORDS, dtype=torch.int32)


def _by_blocks(source: Tensor, width: int, *, is_gated: bool) -> Tensor:
    out = _blocks_like(source, width)
    if out.numel():
        overlap = {"launch_pdl": True} if overlaps(source.device) else {}
        with current(source.device):
            quick(_blocks_kernel)[(source.shape[0] * ceil_div(width // BLOCK, _BLOCKS),)](
                source,
                out,
                source.stride(0),
                WIDTH=width,
                BLOCKS=_BLOCKS,
                GATED=is_gated,
                OVERLAP=bool(overlap),
                num_warps=_BLOCKS,
                enable_fp_fusion=False,  # rounds as the kernels apart do
                **overlap,
            )
    return out


@jit
def _quarters(x, first, WIDTH: tl.constexpr, BLOCKS: tl.constexpr):
    """Of BLOCKS blocks from `first` on the columns of each quarter, [BLOCKS, 32] in the dtype of x; 0 behind the end.

    A word of bytes is of the same place in all quarters: so a thread has what it puts together.
    """
    block = first + tl.arange(0, BLOCKS)[:, None]
    at, there = x + block * _BLOCK + tl.arange(0, 32)[None, :], block < WIDTH // _BLOCK
    return (
        tl.load(at, mask=there, other=0.0),
        tl.load(at + 32, mask=there, other=0.0),
        tl.load(at + 64, mask=there, other=0.0),
        tl.load(at + 96, mask=there, other=0.0),
    )


@jit
def _store_blocks(out, values, first, WIDTH: tl.constexpr, BLOCKS: tl.constexpr) -> None:
    """Words of BLOCKS blocks from `first` on of a row, of their quarters' values in float32."""
    # As integers magnitudes have the order of the numbers; an infinity is above all of them, and NaN above that.
    bits = tl.zeros([BLOCKS, 32], tl.int32)
    for q in tl.static_range(4):
        bits = tl.maximum(bits, values[q].to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    largest = tl.max(bits, axis=1)
    is_finite = largest < 0x7F800000
    scale = tl.maximum(tl.where(is_finite, largest, 0).to(tl.float32, bitcast=True) * _INVERSE, _SMALLEST)
    inverse = tl.div_rn(tl.full([BLOCKS], 1.0, tl.float32), scale)[:, None]
    high_words, low_words = tl.zeros([BLOCKS, 32], tl.int32), tl.zeros([BLOCKS, 32], tl.int32)
    sums = ()
    for q in tl.static_range(4):
        held = tl.where(is_finite[:, None], values[q], 0.0) * inverse
        # To the nearest, ties to even: where a float32 has no bits behind the point.
        codes = (held + 12582912.0 - 12582912.0).to(tl.int32)
        high = (codes + 128) >> 8
        high_words |= (high & 255) << (8 * q)
        low_words |= ((codes - high * 256) & 255) << (8 * q)
        sums = sums + (tl.sum(codes, axis=1) * -16,)
    block, word = first + tl.arange(0, BLOCKS)[:, None], tl.arange(0, 32)[None, :]
    there, at = block < WIDTH // _BLOCK, out + block * _WORDS + word
    tl.store(at, high_words, mask=there)
    tl.store(at + 32, low_words, mask=there)
    # Scale and sums, each by whichever thread has that word: stored one by one they would go through shared memory.
    below, above = sums[0] + sums[1], sums[2] + sums[3]
    rest = tl.where(is_finite, scale, float("nan")).to(tl.int32, bitcast=True)[:, None]
    rest = tl.where(word == 1, (below + above)[:, None], rest)
    rest = tl.where(word == 2, below[:, None], rest)
    rest = tl.where(word == 3, above[:, None], rest)
    for q in tl.static_range(4):
        rest = tl.where(word == 4 + q, sums[q][:, None], rest)
    tl.store(at + _SCALE_AT, rest, mask=there & (word < _WORDS - _SCALE_AT))


@jit
def _blocks_kernel(
    x,
    out,
    stride,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    GATED: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    # GATED: of silu(gate) * up, which lie behind each other in a row.
    PROGRAMS: tl.constexpr = (WIDTH // _BLOCK + BLOCKS - 1) // BLOCKS
    program = tl.program_id(0)
    if OVERLAP:
        program = tl.inline_asm_elementwise(_EARLY, "=r,r", [program], dtype=tl.int32, is_pure=False, pack=1)
    row, first = (program // PROGRAMS).to(tl.int64), program % PROGRAMS * BLOCKS
    given, values = _quarters(x + row * stride, first, WIDTH, BLOCKS), ()
    if GATED:
        ups = _quarters(x + row * stride + WIDTH, first, WIDTH, BLOCKS)
        for q in tl.static_range(4):
            gate = given[q].to(tl.float32)
            h = gate * tl.sigmoid(gate) * ups[q].to(tl.float32)
            values = values + (h.to(x.dtype.element_ty).to(tl.float32),)
    else:
        for q in tl.static_range(4):
            values = values + (given[q].to(tl.float32),)
    _store_blocks(out + row * (WIDTH // _BLOCK * _WORDS), values, first, WIDTH, BLOCKS)


@jit
def _norm_kernel(
    stream,
    delta,
    weight,
    out,
    eps,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    # As add_rms_norm_triton.py, whose result is rounded and then put into blocks.
    row = tl.program_id(0)
    if OVERLAP:
        row = tl.inline_asm_elementwise(_EARLY, "=r,r", [row], dtype=tl.int32, is_pure=False, pack=1)
    row = row.to(tl.int64)
    dtype = stream.dtype.element_ty
    olds = _quarters(stream + row * WIDTH, 0, WIDTH, BLOCKS)
    deltas = _quarters(delta + row * WIDTH, 0, WIDTH, BLOCKS)
    weights = _quarters(weight, 0, WIDTH, BLOCKS)
    block = tl.arange(0, BLOCKS)[:, None]
    to, there = stream + row * WIDTH + block * _BLOCK + tl.arange(0, 32)[None, :], block < WIDTH // _BLOCK
    squares = tl.zeros([BLOCKS, 32], tl.float32)
    news, values = (), ()
    for q in tl.static_range(4):
        new = (olds[q].to(tl.float32) + deltas[q].to(tl.float32)).to(dtype)
        tl.store(to + 32 * q, new, mask=there)
        wide = new.to(tl.float32)
        squares += wide * wide
        news = news + (wide,)
    scale = tl.math.rsqrt(tl.sum(tl.sum(squares, axis=1), axis=0) / WIDTH + eps)
    for q in tl.static_range(4):
        factor = weights[q].to(dtype).to(tl.float32)
        values = values + (((news[q] * scale).to(dtype).to(tl.float32) * factor).to(dtype).to(tl.float32),)
    _store_blocks(out + row * (WIDTH // _BLOCK * _WORDS), values, 0, WIDTH, BLOCKS)
