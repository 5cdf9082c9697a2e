"""Optimiser states on the host, with real copies: the same bits, no wait, little memory, both directions at once."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tunesmith.checkpoint.state import load_state, save_state
from tunesmith.model.transfer import pinned_memory
from tunesmith.recipe.schema import TrainSection
from tunesmith.train import optimizer_offload
from tunesmith.train.allocator import cap_device_memory
from tunesmith.train.host_states import HostStates
from tunesmith.train.states import capture_state, restore_state
from tunesmith.train.update import Updater
from tunesmith.units import MIB

pytestmark = pytest.mark.gpu
Guard = Callable[[], AbstractContextManager[None]]
DEVICE = torch.device("cuda", 0)
WIDTH = 4096
PIECE_BYTES = 24 * MIB
"""A weight of the model below is cut into parts of 11 MB: still large ones for AdamW."""
WITHIN: dict[str, Any] = {"optimizer_in_backward": True, "max_grad_norm": 0.0}


def _loss(module: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
    return (module(batch) - batch).float().square().sum(), len(batch)


def _updater(offloads: bool, layers: int = 3, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Updater:
    torch.manual_seed(0)
    parts: list[nn.Module] = [nn.Linear(WIDTH, WIDTH) for _ in range(layers)]
    module = nn.Sequential(*parts, nn.LayerNorm(WIDTH)).to(DEVICE, dtype)
    section = TrainSection(learning_rate=1e-3, weight_decay=0.01, offload_optimizer=offloads, **settings)
    return Updater(module, section, 20)


def _batches(number: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(number)
    return [torch.randn(32, WIDTH, device=DEVICE, generator=generator).to(dtype) for _ in range(number % 2 + 1)]


def _train(updater: Updater, steps: range) -> list[float]:
    dtype = next(updater.module.parameters()).dtype
    most = 1 if updater.settings.optimizer_in_backward else 2
    windows = [_batches(step, dtype)[:most] for step in steps]
    queued = [
        updater.submit(step, window, _loss, denominator=64, describe=lambda _: "")
        for step, window in zip(steps, windows, strict=True)
    ]
    return [pending.read().loss for pending in queued]


def _assert_same(one: Updater, other: Updater) -> None:
    for updater in (one, other):
        if isinstance(updater.optimizer, HostStates):
            updater.optimizer.settle()
    for a, b in zip(one.module.parameters(), other.module.parameters(), strict=True):
        assert torch.equal(a, b)
        states, others = one.optimizer.state[a], other.optimizer.state[b]
        assert sorted(states) == sorted(others)
        for name, value in states.items():
            same = torch.equal(value.cpu(), others[name].cpu()) if isinstance(value, Tensor) else value == others[name]
            assert same, name


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer_offload, "HostStates", partial(HostStates, piece_bytes=PIECE_BYTES))


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("more", [{"max_grad_norm": 0.5}, WITHIN], ids=["after", "within"])
def test_the_same_bits(optimizer: str, dtype: torch.dtype, more: dict[str, Any], small_pieces: None) -> None:
    plain, moved = (_updater(flag, dtype=dtype, optimizer=optimizer, **more) for flag in (False, True))
    losses = _train(plain, range(6))
    assert losses[-1] < losses[0]
    assert _train(moved, range(6)) == losses
    _assert_same(plain, moved)
    assert isinstance(moved.optimizer, HostStates)
    large = [p for p in moved.module.parameters() if p.ndim == 2]
    for parameter in large:
        states = [v for v in moved.optimizer.state[parameter].values() if isinstance(v, Tensor) and v.ndim]
        assert all(value.device.type == "cpu" and value.is_pinned() for value in states)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("on_first", [True, False])
def test_a_checkpoint_goes_on_with_and_without(
    optimizer: str, on_first: bool, tmp_path: Path, small_pieces: None
) -> None:
    straight = _updater(on_first, optimizer=optimizer)
    _train(straight, range(2))
    weights = dict(straight.module.named_parameters())
    state = load_state(save_state(tmp_path, capture_state(2, weights, straight, DEVICE, {}), keep=1))
    expected = _train(straight, range(2, 5))
    other = _updater(not on_first, optimizer=optimizer)
    restore_state(state, dict(other.module.named_parameters()), other, DEVICE)
    assert _train(other, range(2, 5)) == expected
    _assert_same(straight, other)


@pytest.mark.parametrize("more", [{}, WITHIN], ids=["after", "within"])
def test_the_host_never_waits(more: dict[str, Any], small_pieces: None, no_waiting: Guard) -> None:
    updater = _updater(True, **more)
    _train(updater, range(2))
    batch = _batches(0, torch.bfloat16)
    with no_waiting():
        updater.submit(2, batch, _loss, denominator=32, describe=lambda _: "")


def test_the_device_holds_three_pieces(small_pieces: None) -> None:
    updater = _updater(True, layers=8)
    _train(updater, range(2))
    optimizer = updater.optimizer
    for parameter in updater.module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= 3.1 * PIECE_BYTES
    assert torch.cuda.memory_allocated() - before < MIB


def _milliseconds(run: Callable[[], object], times: int = 5) -> float:
    found = []
    for _ in range(times):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        run()
        ended.record()
        ended.synchronize()
        found.append(began.elapsed_time(ended))
    return statistics.median(found)


def test_both_directions_move_at_once() -> None:
    """An update of 2.1 GB of states takes little longer than the slower of their two ways alone."""
    updater = _updater(True, layers=32)
    _train(updater, range(2))
    optimizer = updater.optimizer
    for parameter in updater.module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    moved = sum(2 * p.nbytes for p in updater.module.parameters() if p.nbytes >= MIB)
    host = pinned_memory(256 * MIB, "")
    device = torch.empty_like(host, device=DEVICE)
    ways = [_milliseconds(partial(a.copy_, b, non_blocking=True)) for a, b in ((device, host), (host, device))]
    alone = [way * moved / host.numel() for way in ways]
    update = _milliseconds(optimizer.step)
    gb = moved / 1e9
    print(f"{gb:.2f} GB: in {alone[0]:.1f} ms, out {alone[1]:.1f} ms, update {update:.1f} ms")
    assert update < 0.8 * sum(alone)


def test_a_cap_of_memory_holds() -> None:
    cap_device_memory(DEVICE, 2.0)
    try:
        held = torch.empty(10**9, dtype=torch.uint8, device=DEVICE)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(3 * 10**9, dtype=torch.uint8, device=DEVICE)
        del held
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)
