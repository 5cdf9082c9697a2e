"""Heads between the projection and the mixer: norms and rotation against the eager layers and autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tunesmith.kernels.rope import rope_tables_half
from tunesmith.model.heads import HalfRope, Heads
from tunesmith.model.layers import RMSNorm, apply_rope

TOKENS, HEADS = 7, Heads(num_heads=4, num_kv_heads=2, head_dim=6, eps=1e-5)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _norms(has_norms: bool) -> tuple[RMSNorm, RMSNorm] | None:
    if not has_norms:
        return None
    norms = RMSNorm(6, 1e-5), RMSNorm(6, 1e-5)
    for i, norm in enumerate(norms):
        torch.nn.init.normal_(norm.weight, 1, 0.3, generator=torch.Generator().manual_seed(i))
    return norms


def _rope(is_rotated: bool) -> HalfRope | None:
    inverse = 1.0 / (10_000.0 ** (torch.arange(0, 6, 2) / 6))
    return rope_tables_half(inverse, torch.arange(TOKENS) * 3) if is_rotated else None


def _eager(qkv: Tensor, norms: tuple[RMSNorm, RMSNorm] | None, rope: HalfRope | None) -> tuple[Tensor, ...]:
    query, key, value = HEADS.split(qkv)
    if norms is not None:
        query, key = norms[0](query), norms[1](key)
    if rope is not None:
        cos, sin = (torch.cat((table, table), dim=-1)[:, None, :] for table in rope)
        query, key = apply_rope(query, cos, sin), apply_rope(key, cos, sin)
    return query, key, value


@pytest.mark.parametrize("is_rotated", [True, False])
@pytest.mark.parametrize("has_norms", [True, False])
def test_equals_the_eager_layers_and_autograd(has_norms: bool, is_rotated: bool) -> None:
    norms, rope = _norms(has_norms), _rope(is_rotated)
    weights = (None, None) if norms is None else (norms[0].weight.detach(), norms[1].weight.detach())
    qkv = random(TOKENS, 48).requires_grad_()
    expected = _eager(qkv, norms, rope)
    *parts, held = HEADS.prepare(qkv.detach().clone(), weights, rope)
    grads = tuple(random(*part.shape, seed=i) for i, part in enumerate(parts))
    for part, truth in zip(parts, expected, strict=True):
        torch.testing.assert_close(part, truth, rtol=1e-5, atol=1e-6)
    trained = [] if norms is None else [norms[0].weight, norms[1].weight]
    truths = torch.autograd.grad(expected, [qkv, *trained], grads)
    given = grads[0].clone(), grads[1].clone(), grads[2].clone()
    found = HEADS.backward(given, weights, held, rope, True)
    for mine, truth in zip([part for part in found if part is not None], truths, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-5, atol=2e-6)
    assert all(torch.equal(a, b) for a, b in zip(grads, given, strict=True))  # they are not ours to write to


@torch.no_grad()
def test_what_is_held_is_the_projections_own() -> None:
    norms = _norms(True)
    assert norms is not None
    qkv = random(TOKENS, 48)
    before = qkv.clone()
    *_, held = HEADS.prepare(qkv, (norms[0].weight, norms[1].weight), _rope(True))
    assert held[0] is qkv
    assert torch.equal(qkv, before)
    assert held[1] is not None and held[1].shape == (TOKENS, 4)
    assert HEADS.prepare(qkv, (None, None), _rope(True))[3] == (None, None, None)
    assert not torch.equal(qkv, before)


def test_weights_that_are_not_trained_get_no_gradient() -> None:
    norms = _norms(True)
    assert norms is not None
    weights = (norms[0].weight.detach(), norms[1].weight.detach())
    *parts, held = HEADS.prepare(random(TOKENS, 48), weights, None)
    _, *dweights = HEADS.backward((parts[0], parts[1], parts[2]), weights, held, None, False)
    assert dweights == [None, None]
