"""Operators without the dispatcher: only where nothing has to see them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.kernels.direct import direct


@pytest.fixture(scope="module")
def operator() -> Any:
    @torch.library.custom_op("tunesmith_test::add_into", mutates_args=("out",))
    def add_into(x: Tensor, out: Tensor, number: float) -> Tensor:
        out.add_(x)
        return out * number

    @add_into.register_fake
    def _fake(x: Tensor, out: Tensor, number: float) -> Tensor:
        return torch.empty_like(out)

    return add_into


def test_the_function_gives_what_the_operator_gives(operator: Any) -> None:
    x, first = torch.arange(3.0), torch.ones(3)
    second = first.clone()
    with torch.inference_mode():
        launch = direct(operator, x)
        assert launch is not operator
        assert torch.equal(launch(x, first, 2.0), operator(x, second, 2.0))
    assert torch.equal(first, second)


def test_what_must_be_seen_goes_through_the_dispatcher(operator: Any) -> None:
    x = torch.arange(3.0)
    assert direct(operator, x) is operator, "it may be trained"
    with torch.inference_mode():
        assert direct(operator, torch.empty(3, device="meta")) is operator
        assert direct(operator, torch.nn.Parameter(x)) is operator
        with torch._subclasses.FakeTensorMode():
            assert direct(operator, torch.empty(3)) is operator
