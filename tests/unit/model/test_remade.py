"""Query, key and value made again for whatever attention saves of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tunesmith.model.remade import Made, RemadeHeads

SHAPE = (6, 3, 4)


def _heads() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    query, key, value = torch.randn(SHAPE[0], 3 * SHAPE[1], SHAPE[2], dtype=torch.float64).split(SHAPE[1], dim=1)
    return query, key, value


def _mixed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Saves views (transposed), and a copy that is none of the three."""
    scores = query.transpose(0, 1) @ key.permute(1, 2, 0)
    return scores.softmax(-1) @ value.transpose(0, 1)


def test_gradients_are_those_of_what_was_held_and_it_is_made_once() -> None:
    calls = []
    remade = RemadeHeads()

    def make() -> Made:
        calls.append(1)
        assert not torch.is_grad_enabled()
        return *_heads(), (None, None, None)

    given = [t.requires_grad_() for t in _heads()]
    expected = torch.autograd.grad(_mixed(*given).sum(), given)
    remade.made_by(make)
    with remade.not_held(*given):
        mixed = _mixed(*given)
    assert not calls
    grads = torch.autograd.grad(mixed.sum(), given)
    for one, other in zip(expected, grads, strict=True):
        assert torch.equal(one, other)
    assert remade.take() == (None, None, None)
    assert len(calls) == 1


def test_none_of_the_three_is_saved() -> None:
    remade = RemadeHeads()
    remade.made_by(lambda: (*_heads(), (None, None, None)))
    query, key, value = (t.detach() for t in _heads())
    weight = torch.ones(SHAPE[2], dtype=torch.float64, requires_grad=True)
    with remade.not_held(query, key, value):
        out = query * weight + (key * weight).exp()
    node = out.grad_fn
    assert node is not None
    before = query.clone()
    query.zero_()  # what was given away may be written over
    (grad,) = torch.autograd.grad(out.sum(), weight)
    expected = (before + key * (key * weight).exp()).sum((0, 1))
    torch.testing.assert_close(grad, expected.detach())


def test_a_second_backward_pass_says_what_is_wrong() -> None:
    remade = RemadeHeads()
    remade.made_by(lambda: (*_heads(), (None, None, None)))
    given = [t.requires_grad_() for t in _heads()]
    with remade.not_held(*given):
        mixed = _mixed(*given)
    torch.autograd.grad(mixed.sum(), given, retain_graph=True)
    remade.take()
    with pytest.raises(RuntimeError, match="selective-qkv"):
        torch.autograd.grad(mixed.sum(), given)


def test_without_gradients_nothing_is_noted() -> None:
    remade = RemadeHeads()
    remade.made_by(lambda: (*_heads(), (None, None, None)))
    with torch.no_grad(), remade.not_held(*_heads()):
        assert not _mixed(*_heads()).requires_grad
