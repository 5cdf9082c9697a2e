"""Beginning while the kernel before ends (`launch.overlapped`), in kernels whose programs may have nothing to do.

    head = let_next_begin(head)                         first of all: who is launched next may begin beside this
    ... reads what nothing in the pass writes ...
    head = when_known_and_through(head, number)         in every program, before any return
    ... reads and writes the rest, at addresses that `head` is part of ...

A kernel is through when all its programs are, and what it waited for is through before it. A program that returned
without waiting would end that: the kernel after it could begin to read while the one before it still writes.
Imported only where Triton is installed. Source: PTX ISA, griddepcontrol.
"""

# Triton's decorator and its kernels' arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton.language as tl

from tunesmith.kernels.jit import jit

BEGIN = tl.constexpr("griddepcontrol.launch_dependents; mov.b32 $0, $1;")
# The predicate is always true: it makes the assembler work out the number before, which it would put behind the wait.
WAIT = tl.constexpr("{ .reg .pred p; setp.ne.s32 p, $2, 0x80000000; @p griddepcontrol.wait; mov.b32 $0, $1; }")


@jit
def let_next_begin(place):
    """`place`, an int32; the kernel launched next may begin as soon as all programs of this one are here."""
    return tl.inline_asm_elementwise(BEGIN, "=r,r", [place], dtype=tl.int32, is_pure=False, pack=1)


@jit
def when_known_and_through(place, number):
    """`when_earlier_is_through` of an int32, behind what makes `number`, which is never -2^31."""
    return tl.inline_asm_elementwise(WAIT, "=r,r,r", [place, number], dtype=tl.int32, is_pure=False, pack=1)
