"""A change anywhere below is noticed; a look at modules that did not change goes through none of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from tunesmith.model.entries import Entries


def _model() -> Any:
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU()))


def _replace_inner_module(model: Any) -> None:
    model[1][0] = nn.Linear(2, 2, bias=False)


def _replace_parameter(model: Any) -> None:
    model[1][0].weight = nn.Parameter(model[1][0].weight.detach().clone())


def _add_parameter(model: Any) -> None:
    model[1].register_parameter("scale", None)


def _remove_module(model: Any) -> None:
    del model[1][1]


def _remove_bias(model: Any) -> None:
    model[0].bias = None


@pytest.mark.parametrize(
    "change", [_replace_inner_module, _replace_parameter, _add_parameter, _remove_module, _remove_bias]
)
def test_a_change_is_noticed(change: Callable[[Any], None]) -> None:
    model = _model()
    entries = Entries(model.modules())
    assert entries.are_same()
    change(model)
    assert not entries.are_same()
    assert Entries(model.modules()).are_same()


def test_values_and_flags_are_no_change() -> None:
    model = _model()
    entries = Entries(model.modules())
    nn.init.zeros_(model[0].weight)
    model.requires_grad_(False).eval()
    assert entries.are_same()


def test_nothing_is_walked(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = Entries(_model().modules())
    for name in ("named_modules", "named_children", "__getattr__"):
        monkeypatch.delattr(nn.Module, name)
    assert entries.are_same()
