"""Which kernels and shapes the sweep over decoding's products has."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")


@pytest.mark.parametrize("tokens", [1, 8, 16])
def test_what_a_kernel_takes_now_comes_first_and_bytes_are_for_few(tokens: int) -> None:
    from tunesmith.bench.decode_tiles import RUNS, tiles
    from tunesmith.kernels import gemv_quads_triton, int4_bytes_operator

    found = tiles(3, 37888, 3584, tokens, 132)
    assert {kernel for kernel, _ in found} <= set(RUNS)
    assert len(set(found)) == len(found)
    first = dict(reversed(found))
    assert first["fragments"] == gemv_quads_triton.shape_of(3, 37888, 3584, 132, tokens)
    assert ("bytes" in first) is (tokens <= 8)
    if tokens <= 8:
        assert first["bytes"] == int4_bytes_operator.shape_of(37888, 3584, 132, 1 if tokens <= 4 else 2)
    assert "bytes" not in dict(tiles(3, 1024, 896, tokens, 132))
    assert "bytes" not in dict(tiles(1, 1024, 1024, tokens, 132))


def test_an_input_is_put_into_bytes_once() -> None:
    from tunesmith.bench.decode_tiles import in_bytes

    x = torch.ones(1, 256)
    assert in_bytes(x) is in_bytes(x)
    assert in_bytes(torch.zeros(1, 256)) is not in_bytes(x)
