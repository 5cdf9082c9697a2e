"""What a thread does in `gemv_quads_triton`: loads of its words, codes made operands, products by the tensor cores.

Each is an instruction or a few in PTX (BY_HAND), and beside it the same in Triton, which its interpreter runs.
Source: PTX ISA, ld, griddepcontrol, bar.warp.sync, prmt, lop3, fma, and matrix fragments for mma.m16n8k16 with floating
point type.
"""

# Triton's decorator and its kernels' arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, var-annotated, operator, index"
# Tuples grow in Triton's loops, and Triton knows no starred ones.
# ruff: noqa: RUF005

from __future__ import annotations

import triton.language as tl

from tunesmith.kernels.jit import jit

# Byte offsets from a lane's place, by what is loaded: the words of a weight's row; the input of 16 columns, and 64
# columns on that of 16 more; that of a block of 128 int4 columns, each plane's four.
_OFFSETS = {"weight": (0, 64), "bytes": (0, 16, 128, 144), "planes": tuple(range(0, 256, 32))}


def _loads(kind: str, how: str = "", vector: int = 4, *, zeros: bool = False) -> str:
    """PTX that loads a vector of words at each offset from one address, unless the last operand is 0.

    What is not loaded is whatever it is; zeros: it is 0. Not ld.global.nc: such loads are moved past barriers, and an
    input's even before the end of the kernel that writes it (seen in the machine code of `when_earlier_is_through`).
    """
    count = vector * len(_OFFSETS[kind])
    names = [f"${i}" for i in range(count)]
    lines = [f"mov.b32 {name}, 0;" for name in names] if zeros else []
    for i, offset in enumerate(_OFFSETS[kind]):
        some = ", ".join(names[vector * i : vector * (i + 1)])
        lines.append(f"@p ld.global.{how}v{vector}.b32 {{{some}}}, [${count} + {offset}];")
    return f"{{ .reg .pred p; setp.ne.b32 p, ${count + 1}, 0; {' '.join(lines)} }}"


def _under(shift: int, mask: str, magic: str) -> str:
    """PTX of ($1 >> shift) & mask | magic: lop3 0xea is (a & b) | c."""
    shifted = f"shr.u32 t, $1, {shift};" if shift else "mov.b32 t, $1;"
    return f"{{ .reg .b32 t; {shifted} lop3.b32 $0, t, {mask}, {magic}, 0xea; }}"


def _mma_of(kind: str) -> str:
    return (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )


# Weights pass through once: they leave the first cache to the input.
LOAD_WEIGHT = tl.constexpr(_loads("weight", "L1::no_allocate.L2::128B."))
# What is an operand as it is must be 0 where it is not there: times 0 an infinity would not be.
LOAD_WEIGHT_OR_ZEROS = tl.constexpr(_loads("weight", "L1::no_allocate.L2::128B.", zeros=True))
LOAD_OPERANDS = tl.constexpr(_loads("weight", zeros=True))
LOAD_BYTES, LOAD_PLANES = tl.constexpr(_loads("bytes", zeros=True)), tl.constexpr(_loads("planes", vector=2))
WAIT = tl.constexpr("griddepcontrol.wait; mov.b32 $0, $1;")
SETTLED = tl.constexpr("bar.warp.sync 0xffffffff; mov.b32 $0, $1;")
EIGHT, SIXTEEN = (tl.constexpr(",".join(["=r"] * count + ["l", "r"])) for count in (8, 16))
MMA_HALF, MMA_BF16 = tl.constexpr(_mma_of("f16")), tl.constexpr(_mma_of("bf16"))
# Two bfloat16 values times 2^60 (0x5D80), minus zero, which keeps zeros as they are.
TIMES = tl.constexpr("{ .reg .b32 m, z; mov.b32 m, 0x5D805D80; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, m, z; }")
LOW_HALVES, HIGH_HALVES = (tl.constexpr(f"prmt.b32 $0, $1, $2, {which};") for which in ("0x5410", "0x7632"))
# The first two bytes of a word, the last two; nothing above them, their signs (a selector's highest bit) above them.
PAIRS = tl.constexpr([f"prmt.b32 $0, $1, 0, {which};" for which in ("0x4140", "0x4342", "0x9180", "0xB3A2")])

# int4's planes of a half; int8's low bits; its signs with the magic number negative: for bfloat16, then for float16.
UNDER = tl.constexpr(
    [
        _under(*what, magic)
        for magic, negative in (("0x43004300", "0xC300C300"), ("0x64006400", "0xE400E400"))
        for what, magic in (
            *(((4 * j, "0x000f000f"), magic) for j in range(4)),
            ((0, "0x007f007f"), magic),
            ((0, "0x00800080"), negative),
        )
    ]
)


@jit
def _eight(TEXT: tl.constexpr, pointer, wanted, BY_HAND: tl.constexpr):
    # Four words, and four that lie 16 on.
    if BY_HAND:
        return tl.inline_asm_elementwise(
            TEXT,
            EIGHT,
            [pointer.to(tl.int64), wanted.to(tl.int32)],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32),
            # Not pure: what is, is moved down to where it is used, and waited for there.
            is_pure=False,
            pack=1,
        )
    words = ()
    for i in tl.static_range(8):
        words = words + (tl.load(pointer + (i // 4 * 16 + i % 4), mask=wanted, other=0),)
    return words


@jit
def load_weight(pointer, wanted, ZEROS: tl.constexpr, BY_HAND: tl.constexpr):
    """Four words, and four that lie 16 on; where they are not wanted, any (ZEROS: 0)."""
    return _eight(LOAD_WEIGHT_OR_ZEROS if ZEROS else LOAD_WEIGHT, pointer, wanted, BY_HAND)


@jit
def load_operands(pointer, wanted, BY_HAND: tl.constexpr):
    """The same of an input, which others read too; 0 where they are not wanted."""
    return _eight(LOAD_OPERANDS, pointer, wanted, BY_HAND)


@jit
def once_asked_for(place, BY_HAND: tl.constexpr):
    """`place`, behind all loads before it: they are under way before anything is waited for.

    Without that the assembler moves a load down to where its words are multiplied, to save registers.
    """
    if BY_HAND:
        return tl.inline_asm_elementwise(SETTLED, "=r,r", [place], dtype=tl.int32, is_pure=False, pack=1)
    return place


@jit
def when_earlier_is_through(place):
    """`place`, once the kernel launched before is through and its results can be read: what depends on it waits."""
    return tl.inline_asm_elementwise(WAIT, "=r,r", [place], dtype=tl.int32, is_pure=False, pack=1)


@jit
def load_input(pointer, wanted, PLANES: tl.constexpr, BY_HAND: tl.constexpr):
    # PLANES: two words of each of eight planes. Else eight words, and eight that lie 32 on.
    if BY_HAND:
        return tl.inline_asm_elementwise(
            LOAD_PLANES if PLANES else LOAD_BYTES,
            SIXTEEN,
            [pointer.to(tl.int64), wanted.to(tl.int32)],
            dtype=(
                tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32,
                tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32,
            ),
            is_pure=True,
            pack=1,
        )  # fmt: skip
    words = ()
    for i in tl.static_range(16):
        words = words + (
            tl.load(pointer + (i // 2 * 8 + i % 2 if PLANES else i // 8 * 32 + i % 8), mask=wanted, other=0),
        )
    return words


@jit
def side_by_side(p, q, HIGH: tl.constexpr, BY_HAND: tl.constexpr):
    # The low (or high) halves of two words.
    if BY_HAND:
        return tl.inline_asm_elementwise(
            HIGH_HALVES if HIGH else LOW_HALVES, "=r,r,r", [p, q], dtype=tl.int32, is_pure=True, pack=1
        )
    if HIGH:
        return ((p >> 16) & 0xFFFF) | (q & -65536)
    return (p & 0xFFFF) | (q << 16)


@jit
def halves(word, HALF: tl.constexpr):
    # The two values of a word, in float32.
    if HALF:
        low = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        return low, (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)


@jit
def times_2_to_60(word, BY_HAND: tl.constexpr):
    if BY_HAND:
        return tl.inline_asm_elementwise(TIMES, "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1)
    low, high = halves(word, False)
    low, high = low * 1152921504606846976.0, high * 1152921504606846976.0
    return ((low.to(tl.int32, bitcast=True) >> 16) & 65535) | (high.to(tl.int32, bitcast=True) & -65536)


@jit
def _products(a, b, WARPS: tl.constexpr, HALF: tl.constexpr):
    # sums[w, g, n] of the two values in the words of lanes (g, t) of the one and (n, t) of the other, over t
    a_low, a_high = halves(a, HALF)
    b_low, b_high = halves(b, HALF)
    rows: tl.constexpr = [WARPS, 8, 1, 4]
    columns: tl.constexpr = [WARPS, 1, 8, 4]
    low = tl.reshape(a_low, rows) * tl.reshape(b_low, columns)
    return tl.sum(low + tl.reshape(a_high, rows) * tl.reshape(b_high, columns), axis=3)


@jit
def mma(d, a0, a1, a2, a3, b0, b1, WARPS: tl.constexpr, HALF: tl.constexpr, BY_HAND: tl.constexpr):
    """d + a @ b of every warp: a's rows g and g + 8 in a0, a2 and in a1, a3; without assembler by definition."""
    if BY_HAND:
        # Not pure: it must stay where all lanes of a warp are.
        return tl.inline_asm_elementwise(
            MMA_HALF if HALF else MMA_BF16,
            "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
            [a0, a1, a2, a3, b0, b1, d[0], d[1], d[2], d[3]],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=False,
            pack=1,
        )
    upper = _products(a0, b0, WARPS, HALF) + _products(a2, b1, WARPS, HALF)
    lower = _products(a1, b0, WARPS, HALF) + _products(a3, b1, WARPS, HALF)
    # Token 2 t + c of row g is lane 4 g + t's.
    d0, d1 = tl.split(tl.reshape(upper, [32 * WARPS, 2]))
    d2, d3 = tl.split(tl.reshape(lower, [32 * WARPS, 2]))
    return d[0] + d0, d[1] + d1, d[2] + d2, d[3] + d3


@jit
def _under_magic(word, WHICH: tl.constexpr, HALF: tl.constexpr, BY_HAND: tl.constexpr):
    # WHICH: 0 to 3 a plane, 4 low bits, 5 signs.
    if BY_HAND:
        return tl.inline_asm_elementwise(UNDER[6 * HALF + WHICH], "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1)
    if WHICH == 4:
        return (word & 0x007F007F) | (0x64006400 if HALF else 0x43004300)
    if WHICH == 5:
        # 0xE400E400, 0xC300C300: the magic numbers' negatives.
        return (word & 0x00800080) | (-0x1BFF1C00 if HALF else -0x3CFF3D00)
    return ((word >> (4 * WHICH)) & 0x000F000F) | (0x64006400 if HALF else 0x43004300)


@jit
def plane_of(both, PLANE: tl.constexpr, HALF: tl.constexpr, BY_HAND: tl.constexpr):
    """Codes under the exponent that makes them 128 + code, or 1024 + code."""
    return _under_magic(both, PLANE % 4, HALF, BY_HAND)


@jit
def low_bits(both, HALF: tl.constexpr, BY_HAND: tl.constexpr):
    """The same of int8's low seven bits."""
    return _under_magic(both, 4, HALF, BY_HAND)


@jit
def sign_bits(both, HALF: tl.constexpr, BY_HAND: tl.constexpr):
    """Minus the magic number, minus 128 more where the sign is set."""
    return _under_magic(both, 5, HALF, BY_HAND)


@jit
def pair_of(word, SECOND: tl.constexpr, SIGNED: tl.constexpr, BY_HAND: tl.constexpr):
    # Two bytes of a word in the low bytes of its halves; above them their signs (SIGNED) or nothing.
    if BY_HAND:
        return tl.inline_asm_elementwise(
            PAIRS[2 * SIGNED + SECOND], "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1
        )
    low = (word << (8 if SECOND else 24)) >> 24
    high = (word << (0 if SECOND else 16)) >> 24
    mask: tl.constexpr = 0xFFFF if SIGNED else 0xFF
    return (low & mask) | ((high & mask) << 16)
