"""The node in which a parameter's gradient ends, and autograd's thread of a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from tunesmith.model.autograd_threads import renew_accumulators, wake_autograd
from tunesmith.recipe.schema import TrainSection
from tunesmith.train import update
from tunesmith.train.update import Updater


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_parameter_gets_another_node_and_stays_what_it_is(dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.arange(6, dtype=dtype).reshape(2, 3))
    parameter.grad = torch.ones_like(parameter)
    held = (parameter * parameter).sum()
    before, address, version = get_gradient_edge(parameter).node, parameter.data_ptr(), parameter._version
    renew_accumulators([parameter])
    assert get_gradient_edge(parameter).node is not before
    assert (parameter.data_ptr(), parameter._version, parameter.dtype) == (address, version, dtype)
    assert parameter.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    (parameter * 3).sum().backward()
    assert parameter.grad.tolist() == [[4.0] * 3] * 2
    held.backward()  # what it saved is still what it was, and it ends in the same gradient
    assert parameter.grad.tolist() == [[4.0, 6.0, 8.0], [10.0, 12.0, 14.0]]


@pytest.fixture
def woken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """The tensors that `wake_autograd` makes: on the CPU, whatever it asks for."""
    made: list[Tensor] = []
    real = torch.ones

    def ones(*size: Any, device: torch.device, requires_grad: bool) -> Tensor:
        assert device.type == "cuda"
        made.append(real(*size, requires_grad=requires_grad))
        return made[-1]

    monkeypatch.setattr(torch, "ones", ones)
    wake_autograd.cache_clear()
    yield made
    wake_autograd.cache_clear()


def test_autograd_is_woken_once_for_each_gpu(woken: list[Tensor]) -> None:
    """By a backward pass through an operation that computes something: a product with 2."""
    for index in (0, 1, 0):
        with torch.no_grad():
            wake_autograd(torch.device("cuda", index))
    wake_autograd(torch.device("cpu"))
    assert [one.grad.item() for one in woken if one.grad is not None] == [2.0, 2.0]


def test_what_goes_backward_wakes_its_device_first(monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[torch.device] = []
    monkeypatch.setattr(update, "wake_autograd", devices.append)
    Updater(nn.Linear(2, 2), TrainSection(optimizer="sgd", learning_rate=0.1), 1)
    assert devices == [torch.device("cpu")]
