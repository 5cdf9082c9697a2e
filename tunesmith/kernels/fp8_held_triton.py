"""The Triton kernel that quantises wide rows in one pass: a row stays in registers between its maximum and its codes.

A row is cut into pieces whose size is a power of two, so that few registers hold columns that are not there; every
thread takes VECTOR neighbouring columns of a piece: sixteen bytes of a 16-bit row. Columns' factors have twice the
bytes of such a row and are read twice, so the rows of a program share them. Imported only where Triton is installed.
"""

# Triton's decorator and its kernels' arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, operator, var-annotated"
# Tuples grow in Triton's loops, and Triton knows no starred ones.
# ruff: noqa: RUF005

from __future__ import annotations

from dataclasses import dataclass

import triton.language as tl
from torch import Tensor

from tunesmith.kernels.fp8_weight import LARGEST, SMALLEST_SCALE
from tunesmith.kernels.jit import jit
from tunesmith.kernels.quick import quick
from tunesmith.units import ceil_div


@dataclass(frozen=True)
class Held:
    """How rows are held.

    columns: of a piece. rows: of a program. warps, registers: at most so many a thread (None: as many as there are).
    vector: neighbouring columns of a thread. wide: held are float32 products with the factors, which are read once.
    """

    columns: int
    warps: int
    rows: int = 1
    vector: int = 8
    registers: int | None = None
    wide: bool = False


# Up to so many bytes of a row. Measured on an H200 beside eleven other forms, 8,192 rows: 18,944 values 0.116 ms, with
# factors for the columns 0.128 (their bytes alone take 0.109), 37,888 values 0.239 and 0.283 (0.217).
FORMS = ((80 * 1024, Held(2048, 8, registers=128)),)


def held(row_bytes: int) -> Held | None:
    """How rows of so many bytes are held; None: they are not."""
    return next((form for widest, form in FORMS if row_bytes <= widest), None)


def launch_held(x: Tensor, fold: Tensor | None, codes: Tensor, scale: Tensor, form: Held) -> None:
    """Codes and scales of the rows of x [T, D], whose columns lie next to each other."""
    num_rows, width = x.shape
    options = {} if form.registers is None else {"maxnreg": form.registers}
    quick(_held_kernel)[(ceil_div(num_rows, form.rows),)](
        x,
        x if fold is None else fold,
        codes,
        scale,
        x.stride(0),
        num_rows,
        width,
        FOLD=fold is not None,
        WIDE=form.wide and fold is not None,
        BY_HAND=x.element_size() == 2 and x.device.type != "cpu",  # Triton's interpreter has no assembler
        ROWS=form.rows,
        PIECES=ceil_div(width, form.columns),
        COLUMNS=form.columns,
        VECTOR=form.vector,
        INVERSE_LARGEST=1 / LARGEST,
        SMALLEST=SMALLEST_SCALE,
        num_warps=form.warps,
        enable_fp_fusion=False,  # nothing is multiplied and added
        **options,
    )


@jit
def _load(at, lane, width, PIECE: tl.constexpr, PIECES: tl.constexpr, COLUMNS: tl.constexpr, POLICY: tl.constexpr):
    # Only of the last piece columns may be missing. The constant comes last: it is part of the instruction then.
    if PIECE == PIECES - 1:
        value = tl.load(at + PIECE * COLUMNS, mask=lane < width - PIECE * COLUMNS, other=0.0, eviction_policy=POLICY)
    else:
        value = tl.load(at + PIECE * COLUMNS, eviction_policy=POLICY)
    return value


@jit
def _as_loaded(value, BY_HAND: tl.constexpr):
    """The same values: those of 16 bits stay in pairs, instead of float32 that was made of them before."""
    if BY_HAND:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [value], dtype=value.dtype, is_pure=False, pack=2)
    return value


@jit(do_not_specialize=["num_rows"])
def _held_kernel(
    x,
    fold,
    codes,
    scales,
    stride,
    num_rows,
    width,
    FOLD: tl.constexpr,
    WIDE: tl.constexpr,
    BY_HAND: tl.constexpr,
    ROWS: tl.constexpr,
    PIECES: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
    INVERSE_LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
) -> None:
    first = tl.program_id(0) * ROWS
    lane = tl.max_contiguous(tl.arange(0, COLUMNS), VECTOR)
    loaded = ()
    largest = ()
    for i in tl.static_range(ROWS):
        # Rows that are not there are the last once more.
        at = x + tl.minimum(first + i, num_rows - 1).to(tl.int64) * stride + lane
        for piece in tl.static_range(PIECES):
            loaded = loaded + (_load(at, lane, width, piece, PIECES, COLUMNS, "evict_first"),)
        largest = largest + (tl.zeros([COLUMNS // VECTOR], tl.float32),)
    kept = ()
    for piece in tl.static_range(PIECES):
        if FOLD:
            factor = _load(fold + lane, lane, width, piece, PIECES, COLUMNS, "evict_last")
        so_far = ()
        for i in tl.static_range(ROWS):
            value = loaded[i * PIECES + piece].to(tl.float32)
            if FOLD:
                value *= factor
            if WIDE:
                kept = kept + (value,)
            # A thread's own columns first: one number of them, and no talk between threads.
            of_thread = tl.max(tl.reshape(tl.abs(value), [COLUMNS // VECTOR, VECTOR]), axis=1)
            so_far = so_far + (tl.maximum(largest[i], of_thread),)
        largest = so_far
    scale = ()
    for i in tl.static_range(ROWS):
        of_row = scale_of(tl.max(largest[i], axis=0), INVERSE_LARGEST, SMALLEST)
        tl.store(scales + tl.minimum(first + i, num_rows - 1), of_row)
        scale = scale + (of_row,)
    for piece in tl.static_range(PIECES):
        if FOLD and not WIDE:
            # Another policy than before, or the compiler would keep those values, for which there are no registers.
            factor = _load(fold + lane, lane, width, piece, PIECES, COLUMNS, "")
        for i in tl.static_range(ROWS):
            if WIDE:
                value = kept[piece * ROWS + i]
            else:
                value = _as_loaded(loaded[i * PIECES + piece], BY_HAND).to(tl.float32)
                if FOLD:
                    value *= factor
            at = codes + tl.minimum(first + i, num_rows - 1).to(tl.int64) * width + lane
            _store(at, code_of(value, scale[i]), lane, width, piece, PIECES, COLUMNS)


@jit
def _store(at, code, lane, width, PIECE: tl.constexpr, PIECES: tl.constexpr, COLUMNS: tl.constexpr):
    if PIECE == PIECES - 1:
        tl.store(at + PIECE * COLUMNS, code, mask=lane < width - PIECE * COLUMNS)
    else:
        tl.store(at + PIECE * COLUMNS, code)


@jit
def scale_of(largest, INVERSE_LARGEST: tl.constexpr, SMALLEST: tl.constexpr):
    """The scale of rows whose largest magnitude is this."""
    scale = largest * INVERSE_LARGEST
    # Written so that NaN stays NaN.
    return tl.where(scale < SMALLEST, SMALLEST, scale)


@jit
def code_of(value, scale):
    """float32 values in units of their scale, rounded to fp8."""
    return (value * tl.div_rn(1.0, scale)).to(tl.float8e4nv)
