"""Optimiser states on the host, with copies that a CPU makes as late as allowed: the same bits as without it."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from tunesmith.bench.owners import host_state_bytes, owner_bytes
from tunesmith.checkpoint.state import load_state, save_state
from tunesmith.errors import DeviceError, NonFiniteError, RecipeError
from tunesmith.parallel.spread import whole_pieces
from tunesmith.recipe.load import recipe_from_mapping
from tunesmith.recipe.schema import Recipe, TrainSection
from tunesmith.train import optimizer_offload, resolve
from tunesmith.train.adamw import LARGE_BYTES
from tunesmith.train.host_states import AHEAD, HostStates
from tunesmith.train.host_states import PIECE_BYTES as HOST_PIECE_BYTES
from tunesmith.train.optimizers import make_optimizer
from tunesmith.train.resolve import resolve_recipe
from tunesmith.train.session import Session, build_session
from tunesmith.train.states import capture_state, restore_state
from tunesmith.train.update import Updater

CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {"learning_rate": 0.05, "weight_decay": 0.01, "warmup_ratio": 0.5}
WITHIN: dict[str, Any] = {"optimizer_in_backward": True, "max_grad_norm": 0.0}
PIECE_BYTES = 2 * 4 * 2048
OTHER: dict[str, Any] = {"pieces": lambda: whole_pieces(Model().named_parameters()), "device": CPU}
"""A spread that is not a process alone."""


class LateTransfer:
    """Copies when they are waited for; a target holds rubbish until then. Counts what is on the device at once."""

    def __init__(self, to_host: bool, alive: list[weakref.ref[Tensor]]) -> None:
        self.to_host, self.alive = to_host, alive
        self.pending: dict[int, list[tuple[weakref.ref[Tensor], Tensor]]] = {}
        self.number = self.most_values = 0

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> int:
        self.number += 1
        self.pending[self.number] = []
        for target, source in pairs:
            target.fill_(255 if target.dtype == torch.uint8 else math.nan)
            device, host = (source, target) if self.to_host else (target, source)
            self.pending[self.number].append((weakref.ref(device), host))
            if not self.to_host:
                self.alive.append(weakref.ref(device))
        held = [tensor for reference in self.alive if (tensor := reference()) is not None]
        self.most_values = max(self.most_values, sum(tensor.numel() for tensor in held))
        return self.number

    def wait(self, ticket: int) -> None:
        for reference, host in self.pending.pop(ticket):
            device = reference()
            assert device is not None, "freed while it was copied"
            target, source = (host, device) if self.to_host else (device, host)
            target.copy_(source)

    def allocate(self, num_bytes: int) -> Tensor:
        raise AssertionError("states take memory from elsewhere")


Lanes = list[tuple[LateTransfer, LateTransfer]]


@pytest.fixture
def lanes(monkeypatch: pytest.MonkeyPatch) -> Lanes:
    """The copies of every optimiser that is made from now on, as if a CPU's tensors were a GPU's."""
    made: Lanes = []

    def copies(device: torch.device) -> tuple[LateTransfer, LateTransfer]:
        alive: list[weakref.ref[Tensor]] = []
        made.append((LateTransfer(False, alive), LateTransfer(True, alive)))
        return made[-1]

    small = partial(HostStates, piece_bytes=PIECE_BYTES, least_bytes=1024)
    monkeypatch.setattr(optimizer_offload, "copies", copies)
    monkeypatch.setattr(optimizer_offload, "require_gpu", lambda device: None)
    monkeypatch.setattr(resolve, "require_gpu", lambda device: None)
    monkeypatch.setattr(optimizer_offload, "HostStates", small)
    monkeypatch.setattr(optimizer_offload, "pinned_memory", lambda n, advice: torch.full((n,), 9, dtype=torch.uint8))
    return made


class Clock:
    """What a GPU's computation is at, in values that a copy would have moved meanwhile."""

    now = 0.0


class TimedTransfer:
    """Copies that take time on a stream of their own, as `CudaTransfer` ties it to the computation."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.free_at, self.moved = clock, 0.0, 0

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
        values = 0
        for target, source in pairs:
            target.copy_(source)
            values += source.numel()
        self.moved += values
        self.free_at = max(self.free_at, self.clock.now) + values
        return self.free_at

    def wait(self, ticket: float) -> None:
        self.clock.now = max(self.clock.now, ticket)

    def allocate(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)


class Model(nn.Module):
    """A tied weight at both ends that is cut into parts, the last of another length; small ones; one left unused."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(61, 100)
        self.layers = nn.ModuleList(nn.Linear(100, 100) for _ in range(3))
        self.unused = nn.Linear(100, 100)
        self.norm = nn.LayerNorm(100)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = hidden + torch.relu(layer(hidden))
        return self.norm(hidden) @ self.embedding.weight.t()


def _loss(module: nn.Module, tokens: Tensor) -> tuple[Tensor, int]:
    loss = nn.functional.cross_entropy(module(tokens), tokens.flip(0), reduction="sum")
    return loss * (math.nan if int(tokens[0]) == 60 else 1.0), len(tokens)


def _updater(offloads: bool, **settings: Any) -> Updater:
    return Updater(Model(), TrainSection(**{**SETTINGS, **settings, "offload_optimizer": offloads}), 8)


def _train(updater: Updater, steps: Iterable[int]) -> list[float]:
    found = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        number = 1 if updater.settings.optimizer_in_backward else 2
        window = [torch.randint(0, 60, (20,), generator=generator) for _ in range(number)]
        if step == 2:
            window[0][0] = 60
            with pytest.raises(NonFiniteError):
                updater.step(step, window, _loss, denominator=20 * number, describe=str)
        else:
            done = updater.step(step, window, _loss, denominator=20 * number, describe=str)
            found += [done.loss, done.grad_norm]
    return found


def _assert_same(one: Updater, other: Updater) -> None:
    for updater in (one, other):
        if isinstance(updater.optimizer, HostStates):
            updater.optimizer.settle()
    for (name, weight), same in zip(one.module.named_parameters(), other.module.parameters(), strict=True):
        assert torch.equal(weight, same), name
        states, others = one.optimizer.state.get(weight, {}), other.optimizer.state.get(same, {})
        assert sorted(states) == sorted(others)
        for key, value in states.items():
            equal = torch.equal(value, others[key]) if isinstance(value, Tensor) else value == others[key]
            assert equal, (name, key)
            assert not isinstance(value, Tensor) or value.dtype == others[key].dtype


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("more", [{"max_grad_norm": 0.5}, WITHIN], ids=["after", "within"])
def test_the_same_bits(optimizer: str, more: dict[str, Any], lanes: Lanes) -> None:
    """Clipped, accumulated, over a step that is not finite; or each parameter updated in the backward pass."""
    plain, moved = (_updater(flag, optimizer=optimizer, **more) for flag in (False, True))
    assert _train(plain, range(6)) == _train(moved, range(6))
    _assert_same(plain, moved)
    assert isinstance(moved.optimizer, HostStates)
    assert all(transfer.pending == {} for transfer in lanes[0])
    assert lanes[0][0].number > 20
    assert moved.optimizer.inner.state == {}
    assert not moved.optimizer.state[moved.module.get_parameter("unused.weight")]


def test_float16_overflow_takes_steps_back(lanes: Lanes) -> None:
    """8-bit AdamW counts on the host: a part's count must not outlive a step that did not happen."""
    pair = [_updater(flag, optimizer="adamw8bit", precision="float16") for flag in (False, True)]
    for updater in pair:
        assert updater.scaler is not None
        updater.scaler.scale = 2.0**127
        for step in range(3):
            updater.step(step, [torch.arange(20)], _loss, denominator=20, describe=str)
            updater.scaler.scale = 1.0
    _assert_same(*pair)
    assert pair[1].optimizer.state[pair[1].module.get_parameter("embedding.weight")]["step"] == 2


def test_three_pieces_at_most_are_on_the_device(lanes: Lanes) -> None:
    updater = _updater(True)
    _train(updater, range(2))
    values = PIECE_BYTES // 4
    assert 2 * values < max(transfer.most_values for transfer in lanes[0]) <= 3 * values
    assert all(reference() is None for reference in lanes[0][0].alive)
    assert HOST_PIECE_BYTES // 8 > LARGE_BYTES  # a part of a large weight is updated by the large weights' kernel


def test_states_are_under_way_before_their_gradients(lanes: Lanes) -> None:
    """Parameters that are updated one by one come in the order of the step before."""
    updater = _updater(True, **WITHIN)
    ahead: list[int] = []

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        assert isinstance(optimizer, HostStates)
        ahead.append(len(optimizer._coming))

    _train(updater, range(2))  # the second learns what comes after the first's last
    before = [transfer.number for transfer in lanes[0]]
    updater.optimizer.register_step_pre_hook(look)
    _train(updater, [3])
    assert set(ahead) == {AHEAD}
    fetched, sent = (transfer.number - number for transfer, number in zip(lanes[0], before, strict=True))
    assert fetched == sent == before[1] / 2  # nothing for nothing


def _timed(clock: Clock, one_by_one: bool) -> tuple[HostStates, list[nn.Parameter], TimedTransfer]:
    weights = [nn.Parameter(torch.zeros(4096 * (1 + number % 3))) for number in range(40)]
    settings = TrainSection(learning_rate=1e-3)
    inner = make_optimizer([(str(number), weight) for number, weight in enumerate(weights)], settings)
    incoming, outgoing = TimedTransfer(clock), TimedTransfer(clock)
    states = HostStates(
        inner, incoming, outgoing, incoming.allocate, one_by_one=one_by_one, piece_bytes=2 * 4 * 4096, least_bytes=1
    )
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    return states, weights, incoming


def _ahead(states: HostStates) -> int:
    """Values that were fetched for the step after."""
    return sum(
        value.numel() for flight in states._coming for arriving in flight.arriving for value in arriving.values()
    )


def test_both_directions_move_at_once() -> None:
    """An update takes as long as the states take one way, and little more: a piece at either end."""
    clock = Clock()
    states, _, incoming = _timed(clock, one_by_one=False)
    states.step()
    assert incoming.moved <= clock.now <= 1.05 * incoming.moved


def test_copies_pass_beside_the_backward_pass() -> None:
    """Gradients come three at a time, after products that take a little longer than the states of all three."""
    clock = Clock()
    states, weights, incoming = _timed(clock, one_by_one=True)
    products = 0.0
    for step in range(3):
        began, products = clock.now, 0.0
        for number, weight in enumerate(weights):
            if number % 3 == 0:
                work = 1.2 * sum(2 * w.numel() for w in weights[number : number + 3])
                clock.now, products = clock.now + work, products + work
            states.param_groups = [{**states.inner.param_groups[0], "params": [weight]}]
            states.step()
        took = clock.now - began
        assert step > 0 or took > 1.5 * products  # the first does not know what comes next
    assert took <= 1.05 * products
    assert incoming.moved == 3 * sum(2 * weight.numel() for weight in weights) + _ahead(states)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("on_first", [True, False])
@pytest.mark.parametrize("more", [{}, WITHIN], ids=["after", "within"])
def test_a_checkpoint_goes_on_with_and_without(
    optimizer: str, on_first: bool, more: dict[str, Any], tmp_path: Path, lanes: Lanes
) -> None:
    straight = _updater(on_first, optimizer=optimizer, **more)
    _train(straight, range(2))
    weights = dict(straight.module.named_parameters())
    state = load_state(save_state(tmp_path, capture_state(2, weights, straight, CPU, {}), keep=1))
    expected = _train(straight, range(3, 6))
    other = _updater(not on_first, optimizer=optimizer, **more)
    _train(other, range(1))  # with states of its own, which go
    restore_state(state, dict(other.module.named_parameters()), other, CPU)
    assert _train(other, range(3, 6)) == expected
    _assert_same(straight, other)


def test_an_update_that_breaks_off_leaves_nothing_under_way(lanes: Lanes) -> None:
    updater = _updater(True)
    assert isinstance(updater.optimizer, HostStates)
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise ArithmeticError("out of something")

    handle = updater.optimizer.inner.register_step_pre_hook(fail)
    with pytest.raises(ArithmeticError):
        _train(updater, [0])
    handle.remove()
    assert all(transfer.pending == {} for transfer in lanes[0])
    _train(updater, [1])
    assert all(transfer.pending == {} for transfer in lanes[0])


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A model's shape."""
    sizes = {"vocab_size": 272, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", **sizes, **heads}), encoding="utf-8")
    return tmp_path


def _recipe(directory: Path, train: dict[str, Any], **sections: Any) -> Recipe:
    return recipe_from_mapping(
        {
            "model": {"path": str(directory), "device": "cpu", "weights": "random"},
            "method": {"kind": "full"},
            "data": {"format": "tokens", "max_length": 32, "max_rows": 8},
            "train": {"max_steps": 3, "micro_batch_tokens": 64, "accumulation": 2, **train},
            **sections,
        }
    )


def _run(recipe: Recipe) -> tuple[Session, list[float]]:
    session = build_session(recipe)
    losses = [session.step().loss for _ in range(3)]
    session.close()
    return session, losses


def test_a_recipe_trains_the_same(directory: Path, lanes: Lanes) -> None:
    (plain, expected), (moved, losses) = (_run(_recipe(directory, {"offload_optimizer": on})) for on in (False, True))
    assert losses == expected
    assert all(
        torch.equal(a, b)
        for a, b in zip(plain.trained_weights().values(), moved.trained_weights().values(), strict=True)
    )
    assert lanes[0][0].number > 10
    states, large = moved.optimizer, [p for p in moved.trained_weights().values() if p.nbytes >= 1024]
    small = [p for p in moved.trained_weights().values() if p.nbytes < 1024]
    assert host_state_bytes(states) == optimizer_offload.moved_bytes(cast(HostStates, states), moved.recipe.train)
    assert host_state_bytes(states) == sum(2 * p.nbytes for p in large)
    counters = 4 * (len(small) + len(large))
    assert owner_bytes(moved.module, states)["optimizer_bytes"] == sum(2 * p.nbytes for p in small) + counters
    assert host_state_bytes(plain.optimizer) == 0


def test_what_can_not_be_had_is_one_line(directory: Path, monkeypatch: pytest.MonkeyPatch, lanes: Lanes) -> None:
    with pytest.raises(RecipeError, match=r"sgd has no states: use --set train.offload_optimizer=false"):
        _updater(True, optimizer="sgd")
    with pytest.raises(RecipeError, match=r"for a process alone: .* parallel\.offload=cpu"):
        resolve_recipe(_recipe(directory, {"offload_optimizer": True}), world_size=2)
    with pytest.raises(RecipeError, match="for a process alone"):
        Updater(Model(), TrainSection(**SETTINGS, offload_optimizer=True), 8, cast(Any, SimpleNamespace(**OTHER)))
    monkeypatch.setattr(optimizer_offload, "available_memory_bytes", lambda: 100_000)
    with pytest.raises(
        DeviceError, match=r"takes 3\d\d kB of pinned host memory, and 100 kB are free: .*adamw8bit, or"
    ):
        _updater(True)
    monkeypatch.undo()
    with pytest.raises(DeviceError, match=r"the device is cpu: use --set train\.offload_optimizer=false"):
        build_session(_recipe(directory, {"offload_optimizer": True}))
    with pytest.raises(DeviceError, match=r"device_memory_gb is for a GPU, and the device is cpu"):
        build_session(_recipe(directory, {"device_memory_gb": 1}))


def test_states_that_are_all_too_small_to_move_are_told(
    lanes: Lanes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With adapters it said "takes 0 B of pinned host memory", among the news."""
    monkeypatch.setattr(optimizer_offload, "HostStates", HostStates)
    _updater(True)
    assert "train.offload_optimizer moves nothing here: no trained tensor has 1.05 MB" in caplog.text
    assert [record.levelname for record in caplog.records] == ["WARNING"]
