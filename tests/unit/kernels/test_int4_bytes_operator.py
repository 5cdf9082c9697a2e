"""How programs of int4's products by bytes are cut, and what is done where Triton can't be trusted."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")


@pytest.mark.parametrize("tiles", [1, 2, 4])
@pytest.mark.parametrize("rows", [4608, 37888, 3584, 1024, 16, 152064])
@pytest.mark.parametrize("width", [256, 512, 1024, 3584, 18944])
def test_every_warp_has_steps_and_every_processor_warps(rows: int, width: int, tiles: int) -> None:
    from tunesmith.kernels.int4_bytes_operator import registers_of, shape_of

    warps, ahead = shape_of(rows, width, 132, tiles)
    steps, programs = width // 256, -(-rows // 16)
    assert warps <= max(1, steps)
    assert ahead == 1 or (tiles == 1 and steps > 1)
    # As many as are wanted, unless there are no more steps, or a program would be too large.
    assert programs * warps >= 8 * 132 or warps == 8 or 2 * warps * ahead > steps
    registers = registers_of(rows, (warps, ahead), 132)
    assert registers is None or -(-programs // 132) * warps * 32 * registers <= 65536


def test_the_shapes_of_qwen() -> None:
    """Qwen2.5-7B's qkv, output, gate and up, down on an H200: of gate and up all programs run at once."""
    from tunesmith.kernels.int4_bytes_operator import registers_of, shape_of

    sizes = ((4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944))
    assert [shape_of(*size, 132) for size in sizes] == [(4, 2), (8, 2), (1, 1), (8, 2)]
    assert [registers_of(size[0], shape_of(*size, 132), 132) for size in sizes] == [None, None, None, None]


@pytest.mark.parametrize(
    ("tokens", "parts", "tiles"), [(1, 1, 1), (4, 1, 1), (5, 1, 2), (2, 2, 1), (3, 2, 2), (4, 4, 4)]
)
def test_a_tile_has_four_tokens_or_the_groups_of_one(tokens: int, parts: int, tiles: int) -> None:
    from tunesmith.kernels.int4_bytes_operator import tiles_of

    assert tiles_of(tokens, parts) == tiles


def test_where_values_move_between_threads_it_is_the_dequantised_product(monkeypatch: pytest.MonkeyPatch) -> None:
    from tunesmith.kernels import int4_bytes_operator as mine
    from tunesmith.kernels.int4 import quantize_int4
    from tunesmith.kernels.int4_bytes import int4_bytes_reference
    from tunesmith.kernels.x_bytes import x_bytes_reference

    monkeypatch.setattr(mine, "multiply", lambda *_: False)
    generator = torch.Generator().manual_seed(0)
    held = quantize_int4(torch.randn(20, 256, generator=generator), 64)
    made, bias = x_bytes_reference(torch.randn(3, 256, generator=generator)), torch.randn(20, generator=generator)
    found = mine.int4_bytes_operator(made, held.words, held.scales, held.zeros, bias, torch.bfloat16)
    wanted = int4_bytes_reference(made, held, bias, torch.float32)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, rtol=2.0**-6, atol=0.2)
