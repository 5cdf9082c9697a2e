"""Products of some tokens by the tensor cores: one compiled kernel for all numbers of tokens that share a tile."""

from __future__ import annotations

import pytest
import torch

from tunesmith.kernels.warm_up import recorded

pytest.importorskip("triton")


def test_numbers_of_tokens_share_a_kernel() -> None:
    """It was compiled anew while prompts waited: once for multiples of 16, which start-up had run, once for others."""
    from tunesmith.kernels.gemv_dot_triton import dot, dot_kernel

    if not hasattr(dot_kernel, "device_caches"):
        pytest.skip("Triton interprets here (TRITON_INTERPRET): nothing is compiled")
    weight = torch.zeros(768, 512, dtype=torch.int8, device="meta")
    scales = torch.zeros(768, device="meta")

    def products() -> None:
        for num_tokens in (33, 40, 48, 64):
            x = torch.zeros(num_tokens, 512, dtype=torch.bfloat16, device="meta")
            dot(1, x, weight, scales, None, None, x.new_zeros(num_tokens, 768))

    assert len(recorded(products)) == 1
