"""The assembly that unpacks int4 codes, run by an interpreter of the three instructions it has."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton")


def run_ptx(text: str, first: int, second: int) -> int:
    """What `$0` holds after the instructions, for `$1` and `$2`. Source: PTX ISA, prmt, shr and lop3."""
    registers = {"$1": first, "$2": second, "t": 0}

    def value(word: str) -> int:
        return registers[word] if word in registers else int(word, 0)

    for instruction in re.findall(r"(?:prmt|shr|lop3|mov)\.[^;]+", text):
        name, arguments = instruction.split(None, 1)
        target, *operands = [word.strip() for word in arguments.split(",")]
        a, b, *rest = [*(value(word) for word in operands), 0, 0][: max(2, len(operands))]
        if name == "mov.b32":
            registers[target] = a
        elif name == "prmt.b32":
            eight = [*a.to_bytes(4, "little"), *b.to_bytes(4, "little")]
            bytes_of = [(eight[rest[0] >> (4 * i) & 7], rest[0] >> (4 * i) & 8) for i in range(4)]
            chosen = [255 * (byte >> 7) if is_sign else byte for byte, is_sign in bytes_of]
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


def texts(constant: object) -> list[str]:
    """The strings of a list that Triton holds as a constant."""
    found = getattr(constant, "value", constant)
    assert isinstance(found, list)
    return [str(getattr(text, "value", text)) for text in found]


@pytest.mark.parametrize("half", [0, 1])
def test_codes_come_out_under_their_magic_numbers(half: int) -> None:
    from tunesmith.kernels.gemv_fragments_triton import UNDER

    word, (magic, negative) = 0xFED8A5C3, ((0x43004300, 0xC300C300), (0x64006400, 0xE400E400))[half]
    planes, low, signs = texts(UNDER)[6 * half :][:4], texts(UNDER)[6 * half + 4], texts(UNDER)[6 * half + 5]
    for plane, text in enumerate(planes):
        assert run_ptx(text, word, 0) == magic | word >> 4 * plane & 0x000F000F, plane
    assert run_ptx(low, word, 0) == magic | word & 0x007F007F
    assert run_ptx(signs, word, 0) == negative | word & 0x00800080


def test_bytes_and_halves_are_moved_where_products_want_them() -> None:
    from tunesmith.kernels.gemv_fragments_triton import HIGH_HALVES, LOW_HALVES, PAIRS

    first, second = 0x76B43210, 0xFEDCBA98
    low, high = (str(getattr(text, "value", text)) for text in (LOW_HALVES, HIGH_HALVES))
    assert run_ptx(low, first, second) == 0xBA983210
    assert run_ptx(high, first, second) == 0xFEDC76B4
    assert [run_ptx(text, first, 0) for text in texts(PAIRS)] == [0x00320010, 0x007600B4, 0x00320010, 0x0076FFB4]


def test_loads_reach_the_words_that_the_interpreter_reads() -> None:
    """Byte offsets of the vectors, beside the words by which Triton's own loads go."""
    from tunesmith.kernels.gemv_fragments_triton import LOAD_BYTES, LOAD_OPERANDS, LOAD_PLANES, LOAD_WEIGHT

    wanted = {
        LOAD_WEIGHT: [i // 4 * 16 + i % 4 for i in range(8)],
        LOAD_OPERANDS: [i // 4 * 16 + i % 4 for i in range(8)],
        LOAD_BYTES: [i // 8 * 32 + i % 8 for i in range(16)],
        LOAD_PLANES: [i // 2 * 8 + i % 2 for i in range(16)],
    }
    for constant, words in wanted.items():
        text = str(getattr(constant, "value", constant))
        found: dict[int, int] = {}
        for vector, offset in re.findall(r"\{(\$[^}]*)\}, \[\$\d+ \+ (\d+)\]", text):
            for i, name in enumerate(vector.split(", ")):
                found[int(name[1:])] = int(offset) // 4 + i
        assert [found[i] for i in range(len(found))] == words
