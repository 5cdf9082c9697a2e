"""The assembly that unpacks int4 codes, run by an interpreter of the three instructions it has."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton")


def run_ptx(text: str, first: int, second: int) -> int:
    """What `$0` holds after the instructions, for `$1` and `$2`. Source: PTX ISA, prmt, shr and lop3."""
    registers = {"$1": first, "$2": second}

    def value(word: str) -> int:
        return registers[word] if word in registers else int(word, 0)

    for instruction in re.findall(r"(?:prmt|shr|lop3)\.[^;]+", text):
        name, arguments = instruction.split(None, 1)
        target, *operands = [word.strip() for word in arguments.split(",")]
        a, b, *rest = [value(word) for word in operands]
        if name == "prmt.b32":
            eight = [*a.to_bytes(4, "little"), *b.to_bytes(4, "little")]
            chosen = [eight[rest[0] >> (4 * i) & 7] for i in range(4)]
            registers[target] = int.from_bytes(bytes(chosen), "little")
        elif name == "shr.u32":
            registers[target] = a >> b
        else:
            table = rest[1]
            bits = [table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (rest[0] >> i & 1)) & 1 for i in range(32)]
            registers[target] = sum(bit << i for i, bit in enumerate(bits))
    return registers["$0"]


@pytest.mark.parametrize("half", [False, True])
def test_two_codes_come_out_after_their_magic_number(half: bool) -> None:
    from tunesmith.kernels.gemv_dot_triton import ASSEMBLY

    first, second = 0x76543210, 0xFEDCBA98
    for plane in range(8):
        text = getattr(ASSEMBLY, "value", ASSEMBLY)[plane + 8 * half]
        got = run_ptx(getattr(text, "value", text), first, second)
        base = 0x6400 if half else 0x4300
        assert got == (base | first >> 4 * plane & 15) | (base | second >> 4 * plane & 15) << 16, plane
