"""Which products the fragments' kernel takes, how it is cut, and when a compiled one is not trusted."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
LOOP = "%0 = tt.get_program_id\n scf.for %i {\n%1 = tt.elementwise_inline_asm mma.sync %0\n{}\nscf.yield %1 }\n"


@pytest.mark.parametrize(
    ("format_id", "dtype", "tokens", "width", "wanted"),
    [
        (3, torch.bfloat16, 1, 3584, True),
        (3, torch.bfloat16, 64, 18944, True),
        (3, torch.float16, 65, 3584, False),
        (3, torch.float16, 1, 896, False),
        (1, torch.float16, 32, 896, True),
        (2, torch.bfloat16, 33, 896, False),
        (2, torch.float32, 1, 3584, False),
        (0, torch.bfloat16, 16, 1024, True),
        (0, torch.bfloat16, 1, 1000, False),
        (0, torch.float32, 1, 1024, False),
        (4, torch.bfloat16, 1, 3584, False),
    ],
)
def test_what_is_taken(format_id: int, dtype: torch.dtype, tokens: int, width: int, wanted: bool) -> None:
    from tunesmith.kernels.gemv_quads_triton import takes_quads

    assert takes_quads(format_id, torch.empty(tokens, width, dtype=dtype)) == wanted


@pytest.mark.parametrize("format_id", [0, 1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 16, 64])
@pytest.mark.parametrize("rows", [4608, 37888, 3584, 152064, 1024, 16])
def test_no_warp_is_without_a_step_and_no_rest_of_programs_waits(format_id: int, tokens: int, rows: int) -> None:
    from tunesmith.kernels.gemv_quads_triton import _WARPS_HELD, COLUMNS, shape_of

    for width in (256, 1024, 3584, 18944):
        height, warps, ahead = shape_of(format_id, rows, width, 132, tokens)
        programs, steps = -(-rows // height) * -(-tokens // 16), width // COLUMNS[format_id]
        held = _WARPS_HELD[format_id][tokens > 8] * 132
        if warps == 16 and ahead * height <= 16 and tokens <= 8:
            held = 32 * 132  # two programs: their registers are limited to that
        assert height in (8, 16, 32)
        assert warps <= max(2, steps)
        # All run at once, or there are so many that the last of them cost little.
        assert programs * warps <= held or programs > held // 2 or warps == 2


def test_the_shapes_that_were_fastest() -> None:
    """Qwen2.5-7B's qkv, output, gate and up, down on an H200, one token and sixteen."""
    from tunesmith.kernels.gemv_quads_triton import shape_of

    shapes = ((4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944))
    for format_id, tokens, wanted in (
        (2, 1, [(16, 8), (16, 8), (16, 4), (16, 16)]),
        (2, 16, [(16, 4), (16, 8), (16, 4), (16, 8)]),
        (3, 1, [(16, 4), (16, 8), (16, 2), (16, 8)]),
        (0, 1, [(16, 8), (16, 16), (16, 4), (16, 16)]),
    ):
        assert [shape_of(format_id, *shape, 132, tokens)[:2] for shape in shapes] == wanted


def test_values_that_change_threads_are_not_trusted() -> None:
    """The results of the loop may; what is multiplied may not, in a loop or where it was unrolled."""
    from tunesmith.kernels.gemv_quads_triton import stays_in_threads

    moved = "%2 = ttg.convert_layout %1"
    once = "%1 = tt.elementwise_inline_asm mma.sync %0\n"
    assert stays_in_threads(LOOP.replace("{}", "") + moved)
    assert not stays_in_threads(LOOP.replace("{}", moved))
    assert stays_in_threads(once + moved)
    assert not stays_in_threads(moved + "\n" + once)
    assert not stays_in_threads("no products at all")


def test_a_chip_that_is_foreseen_is_asked_for_its_fragments() -> None:
    """On sm_75 the worker that compiles ahead tried kernels that do not compile there."""
    from tunesmith.kernels.chip import Chip, foreseeing
    from tunesmith.kernels.gemv_quads_triton import takes_quads

    x = torch.empty(1, 1024, dtype=torch.float16, device="meta")
    for capability, takes in (((7, 5), False), ((8, 0), True)):
        with foreseeing(Chip(capability, 40)):
            assert takes_quads(3, x) is takes
