"""The written-out final norm is the module's, forward and backward, and decoders whose blocks are fused use it."""

from __future__ import annotations

import pytest
import torch

from tunesmith.model.final_norm import final_norm
from tunesmith.model.layers import LayerNorm, RMSNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [True, False])
def test_it_is_the_modules(dtype: torch.dtype, trained: bool) -> None:
    norm = RMSNorm(48, 1e-5)
    torch.nn.init.normal_(norm.weight)
    norm.weight.requires_grad_(trained)
    x = torch.randn(17, 48).to(dtype)
    direction = torch.randn(17, 48).to(dtype)
    results = []
    for run in (norm, lambda x: final_norm(norm, x)):
        leaf = x.clone().requires_grad_()
        norm.weight.grad = None
        out = run(leaf)
        out.backward(direction)
        results.append([out.detach(), leaf.grad, *([norm.weight.grad] if trained else [])])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for eager, written in zip(*results, strict=True):
        assert eager is not None and written is not None and eager.dtype == written.dtype
        torch.testing.assert_close(written, eager, rtol=tolerance, atol=tolerance)
    assert torch.equal(results[0][0], results[1][0])


def test_other_norms_are_called() -> None:
    norm = LayerNorm(48, 1e-5)
    x = torch.randn(3, 48)
    assert torch.equal(final_norm(norm, x), norm(x))


def test_it_holds_its_input_and_a_number_a_row() -> None:
    norm, held = RMSNorm(48, 1e-5).requires_grad_(False), []
    x = torch.randn(17, 48, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.nbytes) or t, lambda t: t):
        final_norm(norm, x)
    assert sum(held) == x.nbytes + norm.weight.nbytes + 17 * 4
