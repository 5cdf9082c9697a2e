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
        (0, torch.bfloat16, 1, 3584, False),
        (4, torch.bfloat16, 1, 3584, False),
    ],
)
def test_what_is_taken(format_id: int, dtype: torch.dtype, tokens: int, width: int, wanted: bool) -> None:
    from tunesmith.kernels.gemv_quads_triton import takes_quads

    assert takes_quads(format_id, torch.empty(tokens, width, dtype=dtype)) == wanted


@pytest.mark.parametrize("format_id", [1, 2, 3])
@pytest.mark.parametrize(("rows", "width"), [(4608, 3584), (37888, 3584), (3584, 18944), (152064, 3584), (16, 256)])
def test_every_processor_has_work_and_no_warp_is_without_a_step(format_id: int, rows: int, width: int) -> None:
    from tunesmith.kernels.gemv_quads_triton import COLUMNS, shape_of

    tiles, warps = shape_of(format_id, rows, width, 132)
    steps = width // COLUMNS[format_id]
    assert warps <= max(2, steps)
    assert -(-rows // (16 * tiles)) * warps >= 12 * 132 or warps == 16 or 2 * warps > steps


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
