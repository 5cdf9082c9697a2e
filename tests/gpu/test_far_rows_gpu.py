"""A GPU's kernels on rows whose distance 32 bits do not count, and each kernel of attention on a long document."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tunesmith.arch import ModelConfig, read_config
from tunesmith.bench.long_attention import TOLERANCE, check_attention
from tunesmith.kernels.rms_norm import rms_norm, rms_norm_reference
from tunesmith.kernels.rope import rope_, rope_reference_
from tunesmith.kernels.swiglu_low_rank import swiglu_low_rank, swiglu_low_rank_reference
from tunesmith.model import attention, attention_choice

pytestmark = pytest.mark.gpu
STRIDE, ROWS, WIDTH = 2**30 + 64, 4, 256
TOKENS = 8192


@pytest.fixture
def config() -> ModelConfig:
    return read_config(Path(__file__).parents[2] / "recipes" / "configs" / "llama-3.1-8b")


def _far(near: Tensor) -> Tensor:
    store = torch.empty(STRIDE * (ROWS - 1) + WIDTH, dtype=near.dtype, device="cuda")
    return store.as_strided((ROWS, WIDTH), (STRIDE, 1)).copy_(near)


def test_kernels_reach_rows_that_are_far_apart() -> None:
    torch.manual_seed(0)
    near, weight = torch.randn(ROWS, WIDTH, device="cuda").bfloat16(), torch.randn(WIDTH, device="cuda").bfloat16()
    low, up = torch.randn(ROWS, 32, device="cuda").bfloat16(), torch.randn(WIDTH, 32, device="cuda").bfloat16()
    close = partial(torch.testing.assert_close, rtol=2e-2, atol=2e-2)
    close(rms_norm(_far(near), weight, 1e-5)[0], rms_norm_reference(near, weight, 1e-5)[0])
    close(swiglu_low_rank(_far(near), low, up), swiglu_low_rank_reference(near, low, up))
    rows, turned = _far(near), near.clone()
    tables = torch.randn(ROWS, 64, device="cuda").cos(), torch.randn(ROWS, 64, device="cuda").sin()
    rope_(rows.view(ROWS, 2, 128), *tables)
    rope_reference_(turned.view(ROWS, 2, 128), *tables)
    close(rows, turned)


@pytest.mark.parametrize("most", [attention.REACH, TOKENS * 4096, TOKENS * 1024])
def test_every_kernel_of_attention_is_right(most: int, config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """On views of a fused projection, on copies, and in groups of heads: as long documents are taken."""
    monkeypatch.setattr(attention_choice, "_left_out", set())
    monkeypatch.setattr(attention_choice, "_chosen", {})
    monkeypatch.setattr(attention, "REACH", most)
    seen = set()
    while True:
        check = check_attention(config, TOKENS, torch.device("cuda"), torch.bfloat16)
        assert check.error is None, check
        assert check.worst < TOLERANCE / 2, check
        if check.kernel is None or check.kernel in seen:
            break
        seen.add(check.kernel)
        attention_choice.leave_out(check.kernel)
    assert {"varlen", "dense-cudnn", "dense-flash"} >= seen >= {"varlen"}
