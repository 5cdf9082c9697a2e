"""The kernels of kernels/x_bytes.py, as torch custom operators. Imported only where Triton is installed.

They begin while the kernel before them ends, and let the next begin, which asks for its weights meanwhile.
"""

# Triton's decorator and its kernels' arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tunesmith.kernels.add_rms_norm_triton import row_launch
from tunesmith.kernels.int4_layout import BLOCK
from tunesmith.kernels.launch import current, in_rows, overlaps
from tunesmith.kernels.quick import quick
from tunesmith.kernels.x_bytes_layout import BLOCK_WORDS, LARGEST_CODE, SCALE_AT, SMALLEST_SCALE, SUMS_AT
from tunesmith.units import ceil_div

# Columns and warps of a program where blocks are on their own: many programs, since few tokens are waited for.
_COLUMNS = 512
_WARPS = 2
_EARLY = tl.constexpr("griddepcontrol.launch_dependents; griddepcontrol.wait; mov.b32 $0, $1;")
_BLOCK, _WORDS = tl.constexpr(BLOCK), tl.constexpr(BLOCK_WORDS)
_SCALE_AT, _SUMS_AT = tl.constexpr(SCALE_AT), tl.constexpr(SUMS_AT)
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
        columns, warps = row_launch(width)
        overlap = {"launch_pdl": True} if overlaps(stream.device) else {}
        with current(stream.device):
            quick(_norm_kernel)[(num_rows,)](
                stream,
                delta,
                weight.contiguous(),
                out,
                eps,
                WIDTH=width,
                COLUMNS=max(BLOCK, columns),
                OVERLAP=bool(overlap),
                num_warps=warps,
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
            quick(_blocks_kernel)[(source.shape[0] * ceil_div(width, _COLUMNS),)](
                source,
                out,
                source.stride(0),
                WIDTH=width,
                COLUMNS=_COLUMNS,
                GATED=is_gated,
                OVERLAP=bool(overlap),
                num_warps=_WARPS,
                enable_fp_fusion=False,  # rounds as the kernels apart do
                **overlap,
            )
    return out


@triton.jit
def _store_blocks(out, value, first, WIDTH: tl.constexpr, COLUMNS: tl.constexpr) -> None:
    """Words of the blocks of COLUMNS values (float32) from block `first` of a row; 0 behind its end."""
    BLOCKS: tl.constexpr = COLUMNS // _BLOCK
    blocks = tl.reshape(value, [BLOCKS, _BLOCK])
    # An infinity is large, and NaN is not equal to itself.
    odd = tl.sum((~(tl.abs(blocks) < float("inf"))).to(tl.int32), axis=1)
    largest = tl.max(tl.where(tl.abs(blocks) < float("inf"), tl.abs(blocks), 0.0), axis=1)
    scale = tl.maximum(largest * _INVERSE, _SMALLEST)
    inverse = tl.div_rn(tl.full([BLOCKS], 1.0, tl.float32), scale)
    # To the nearest, ties to even: where a float32 has no bits behind the point.
    held = tl.where(odd[:, None] > 0, 0.0, blocks) * inverse[:, None]
    codes = tl.reshape((held + 12582912.0 - 12582912.0).to(tl.int32), [BLOCKS, 4, 32])
    high = (codes + 128) >> 8
    low = codes - high * 256
    place = tl.arange(0, 4)[None, :, None] * 8
    block, word = first + tl.arange(0, BLOCKS), tl.arange(0, 32)[None, :]
    there = block < WIDTH // _BLOCK
    at = out + block * _WORDS
    tl.store(at[:, None] + word, tl.sum((high & 255) << place, axis=1), mask=there[:, None])
    tl.store(at[:, None] + 32 + word, tl.sum((low & 255) << place, axis=1), mask=there[:, None])
    scale = tl.where(odd > 0, float("nan"), scale)
    tl.store(at + _SCALE_AT, scale.to(tl.int32, bitcast=True), mask=there)
    quarters = tl.sum(codes, axis=2) * -16
    halves = tl.sum(tl.reshape(quarters, [BLOCKS, 2, 2]), axis=2)
    two, four = tl.arange(0, 2)[None, :], tl.arange(0, 4)[None, :]
    tl.store(at + _SUMS_AT, tl.sum(halves, axis=1), mask=there)
    tl.store(at[:, None] + _SUMS_AT + 1 + two, halves, mask=there[:, None])
    tl.store(at[:, None] + _SUMS_AT + 3 + four, quarters, mask=there[:, None])


@triton.jit
def _blocks_kernel(
    x,
    out,
    stride,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    GATED: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    # GATED: of silu(gate) * up, which lie behind each other in a row.
    PROGRAMS: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    if OVERLAP:
        program = tl.inline_asm_elementwise(_EARLY, "=r,r", [program], dtype=tl.int32, is_pure=False, pack=1)
    row, first = (program // PROGRAMS).to(tl.int64), program % PROGRAMS * COLUMNS
    column = first + tl.arange(0, COLUMNS)
    mask = column < WIDTH
    value = tl.load(x + row * stride + column, mask=mask, other=0.0)
    if GATED:
        gate, up = value.to(tl.float32), tl.load(x + row * stride + WIDTH + column, mask=mask, other=0.0)
        value = (gate * tl.sigmoid(gate) * up.to(tl.float32)).to(value.dtype)
    to = out + row * (WIDTH // _BLOCK * _WORDS)
    _store_blocks(to, value.to(tl.float32), first // _BLOCK, WIDTH, COLUMNS)


@triton.jit
def _norm_kernel(
    stream,
    delta,
    weight,
    out,
    eps,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    # As add_rms_norm_triton.py, whose result is rounded and then put into blocks.
    column, row = tl.arange(0, COLUMNS), tl.program_id(0)
    if OVERLAP:
        row = tl.inline_asm_elementwise(_EARLY, "=r,r", [row], dtype=tl.int32, is_pure=False, pack=1)
    mask = column < WIDTH
    at = row.to(tl.int64) * WIDTH + column
    dtype = stream.dtype.element_ty
    old = tl.load(stream + at, mask=mask, other=0.0).to(tl.float32)
    new = (old + tl.load(delta + at, mask=mask, other=0.0).to(tl.float32)).to(dtype)
    tl.store(stream + at, new, mask=mask)
    wide = new.to(tl.float32)
    scale = tl.math.rsqrt(tl.sum(wide * wide, axis=0) / WIDTH + eps)
    factor = tl.load(weight + column, mask=mask, other=0.0).to(dtype).to(tl.float32)
    value = ((wide * scale).to(dtype).to(tl.float32) * factor).to(dtype).to(tl.float32)
    _store_blocks(out + row.to(tl.int64) * (WIDTH // _BLOCK * _WORDS), value, 0, WIDTH, COLUMNS)
