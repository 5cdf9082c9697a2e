"""FlexAttention, compiled: the same attention and gradients as document by document, for packs that change."""

from __future__ import annotations

import pytest
import torch

from tunesmith.model.attention import attend_one
from tunesmith.model.flex_attention import attend_flex
from tunesmith.model.packed import packed

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # torch's own compiler, as it is imported by torch 2.11.
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),
]


@pytest.mark.parametrize("window", [None, 200])
def test_compiled_it_is_the_same_attention(window: int | None) -> None:
    torch.manual_seed(0)
    for lengths in ((300, 5, 128, 591), (1000, 24), (7,) * 100 + (324,)):
        num_tokens = sum(lengths)
        tensors = [
            torch.randn(num_tokens, count, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for count in (8, 2, 2)
        ]
        pack = packed(torch.zeros(num_tokens, dtype=torch.int64, device="cuda"), lengths)
        found = attend_flex(tensors[0], tensors[1], tensors[2], pack, window)
        wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
        parts = zip(*(tensor.split(lengths) for tensor in wide), strict=True)
        wanted = torch.cat([attend_one(query, key, value, window) for query, key, value in parts])
        toward = torch.randn_like(found)
        gradients = torch.autograd.grad(found, tensors, toward)
        expected = torch.autograd.grad(wanted, wide, toward.double())
        for one, other in zip((found, *gradients), (wanted, *expected), strict=True):
            assert (one.double() - other).norm() < 0.01 * other.norm()
