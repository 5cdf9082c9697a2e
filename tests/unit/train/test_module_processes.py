"""Any module in several processes: the losses and weights of one, states that any number goes on from, refusals."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tunesmith.checkpoint.state import list_states
from tunesmith.errors import CheckpointError, ParallelError, RecipeError
from tunesmith.parallel.mesh import joined
from tunesmith.recipe.parallel import ParallelSection
from tunesmith.recipe.schema import CheckpointSection, TrainSection
from tunesmith.rundir.io import read_jsonl
from tunesmith.train.loop import Hooks
from tunesmith.train.metrics import StepMetrics
from tunesmith.train.module_processes import begin_alike, check_buffers, data_parallel
from tunesmith.train.module_session import fit

SETTINGS = TrainSection(epochs=3, learning_rate=0.02, seed=5)
STEPS, VALIDATION = 3 * 3, 9
Rows = tuple[Tensor, Tensor]


class Network(nn.Module):
    """Blocks of a list, a parameter with two names, a frozen one, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU()) for _ in range(3))
        self.middle, self.last = (nn.Linear(16, 16, bias=False) for _ in range(2))
        self.last.weight = self.middle.weight
        self.frozen = nn.Parameter(torch.randn(16, 1), requires_grad=False)
        self.register_buffer("scale", torch.tensor([0.5, 2.0]))
        self.scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.middle(self.first(x))
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return self.last(hidden) @ self.frozen * self.scale.prod()


class Sometimes(nn.Module):
    """Uses all of its parameters in its first pass only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.other = (nn.Linear(6, 1) for _ in range(2))
        self.was_called = False

    def forward(self, x: Tensor) -> Tensor:
        out = self.first(x) if self.was_called else self.first(x) + self.other(x)
        self.was_called = True
        return out


class Made(Sequence[Rows]):
    """Seven batches of an epoch, made when they are asked for; remembers which were."""

    def __init__(self, epoch: int, asked: list[tuple[int, int]]) -> None:
        self.epoch, self.asked = epoch, asked
        self.order = torch.randperm(7).tolist() if epoch < VALIDATION else [2, 0, 5, 1, 6, 3, 4]  # seeded for the epoch

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> Rows:  # type: ignore[override]  # it knows no slices
        self.asked.append((self.epoch, index))
        generator = torch.Generator().manual_seed(self.order[index])
        x = torch.randn(3 + index % 2, 6, generator=generator)
        return x, x.sum(1, keepdim=True)


def _network(seed: int = 1) -> Network:
    torch.manual_seed(seed)
    return Network()


def _loss(module: nn.Module, batch: Rows) -> tuple[Tensor, int]:
    return (module(batch[0]) - batch[1]).square().sum(), len(batch[0])


def run(folder: str, strategy: str, stop_after: int | None = None, micro_batches: int | None = 3) -> dict[str, Any]:
    """Train, all of it or until a signal reaches the last process; what came of it in this one."""
    asked: list[tuple[int, int]] = []
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    def on_step(metrics: StepMetrics) -> None:
        if metrics.step == stop_after and rank == size - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    module = _network(seed=1 + rank)  # the first process's weights count
    result = fit(
        module,
        lambda epoch: Made(epoch, asked),
        _loss,
        run_dir=Path(folder),
        settings=SETTINGS,
        validation=Made(VALIDATION, []),
        checkpoint=CheckpointSection(every_steps=4),
        hooks=Hooks(on_step=on_step, on_warning=lambda _: None),
        parallel=ParallelSection(strategy=strategy, micro_batches=micro_batches),
    )
    own = Path(folder) if rank == 0 else Path(folder) / "ranks" / f"rank-{rank}"
    rows = read_jsonl(own / "metrics.jsonl")
    module.eval()
    with torch.no_grad():
        answer = module(torch.ones(2, 6))  # after the processes have parted, in one of them or in all
    return {
        "losses": [row["loss"] for row in rows if row["event"] == "step"],
        "validation": result.validation and result.validation.loss,
        "weights": {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()},
        "answer": answer.numpy(),
        "asked": asked,
        "steps": result.steps,
    }


@pytest.fixture(scope="module")
def alone(ranks: Callable[..., list[Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process with three batches a step."""
    (outcome,) = ranks(run, 1, str(tmp_path_factory.mktemp("one")), "ddp")
    return outcome


def _check_same(outcome: dict[str, Any], alone: dict[str, Any]) -> None:
    assert outcome["steps"] == STEPS
    np.testing.assert_allclose(outcome["losses"], alone["losses"], rtol=1e-5)
    np.testing.assert_allclose(outcome["validation"], alone["validation"], rtol=1e-5)
    np.testing.assert_allclose(outcome["answer"], alone["answer"], rtol=1e-4, atol=1e-6)
    assert outcome["weights"].keys() == alone["weights"].keys()
    for name, weight in alone["weights"].items():
        np.testing.assert_allclose(outcome["weights"][name], weight, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("strategy", ["auto", "zero3", pytest.param("zero2", marks=pytest.mark.long)])
def test_two_processes_make_the_steps_of_one(
    ranks: Callable[..., list[Any]], tmp_path: Path, alone: dict[str, Any], strategy: str
) -> None:
    """Seven batches in windows of three: some windows have one for the first process only, and a filler."""
    outcomes = ranks(run, 2, str(tmp_path), strategy)
    for outcome in outcomes:
        _check_same(outcome, alone)
    assert sorted(set(outcomes[0]["asked"])) == [(epoch, i) for epoch in range(3) for i in (0, 2, 3, 5, 6)]
    assert sorted(set(outcomes[1]["asked"])) == [(epoch, i) for epoch in range(3) for i in (1, 4, 6)]
    assert [path.name for path in list_states(tmp_path / "checkpoints")][-1] == f"step-{STEPS:08d}"


LONG_CHAIN = ((2, 2), (1, 5), (3, None), (3, None))
"""The last finds nothing left to do."""


@pytest.mark.parametrize(
    ("strategy", "chain"),
    [
        ("zero3", ((2, 4), (1, None))),
        pytest.param("zero3", LONG_CHAIN, marks=pytest.mark.long),
        pytest.param("ddp", LONG_CHAIN, marks=pytest.mark.long),
    ],
)
def test_any_number_of_processes_goes_on(
    ranks: Callable[..., list[Any]],
    tmp_path: Path,
    alone: dict[str, Any],
    strategy: str,
    chain: tuple[tuple[int, int | None], ...],
) -> None:
    """A frozen parameter, a buffer and a parameter with two names come back whatever number of processes saved them."""
    for count, stop in chain:
        outcomes = ranks(run, count, str(tmp_path), strategy, stop)
        assert {outcome["steps"] for outcome in outcomes} == {stop or STEPS}
    _check_same({**outcomes[0], "validation": alone["validation"]}, alone)


def resumed_with_another_width(folder: str) -> str:
    """The message."""
    run(folder, "ddp", stop_after=1)
    with pytest.raises(CheckpointError) as caught:
        run(folder, "ddp", micro_batches=None)
    return str(caught.value)


def refusals(folder: str) -> list[str]:
    """What several processes can't do, said."""
    messages = []

    def ask(module: nn.Module, kind: type[Exception], settings: TrainSection = SETTINGS, **more: Any) -> None:
        with pytest.raises(kind) as caught:
            fit(module, Made(0, []), more.pop("loss", _loss), run_dir=Path(folder), settings=settings, **more)
        messages.append(str(caught.value))

    unused = _network()
    unused.other = nn.Linear(2, 2)
    normed = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    ask(normed, ParallelError)
    ask(_network(), RecipeError, SETTINGS.model_copy(update={"optimizer_in_backward": True}))
    ask(unused, ParallelError)
    ask(
        _network(),
        ParallelError,
        loss=lambda module, batch: (module.first(batch[0]).sum(), 1),
        parallel=ParallelSection(strategy="zero3"),
    )
    ask(Sometimes(), ParallelError)
    ask(_network().requires_grad_(False), RecipeError)
    turned = _network()
    turned.middle.weight = nn.Parameter(turned.middle.weight.detach().t())
    ask(turned, ParallelError, parallel=ParallelSection(strategy="zero1"))
    ask(nn.Linear(6, 1), ParallelError, parallel=ParallelSection(strategy="zero3"))
    tied = _network()
    tied.first = nn.Linear(6, 16)
    tied.layers[1][1].weight = tied.middle.weight  # type: ignore[index]
    ask(tied, ParallelError, parallel=ParallelSection(strategy="zero2"))
    with joined(ParallelSection(), "cpu") as mesh:
        for action in (lambda m: begin_alike(m, mesh, {}), lambda m: check_buffers(m, mesh)):
            module = _network()
            module.register_buffer("scale", torch.full((2 + int(not messages[9:]) * mesh.rank,), 1.0 + mesh.rank))
            with pytest.raises(ParallelError) as caught:
                action(module)
            messages.append(str(caught.value))
    return messages


def take_any_layout() -> dict[str, Any]:
    """A module of every process's own after `begin_alike`: masks, and tensors that lie in memory in other ways."""
    own = 1.0 + int(os.environ["RANK"])
    module = nn.Module()
    module.turned = nn.Parameter(torch.arange(6.0).reshape(3, 2).mul(own).t())
    backing = torch.full((3,), own)
    module.register_buffer("mask", torch.tensor([own == 1, True]))
    module.register_buffer("same", backing[:1].expand(4))
    module.register_buffer("short", torch.tensor(7 * own).to(torch.int16))
    module.register_buffer("none", torch.ones(0))
    with joined(ParallelSection(), "cpu") as mesh:
        begin_alike(module, mesh, {})
    return {**{name: tensor.tolist() for name, tensor in module.state_dict().items()}, "behind": backing[1:].tolist()}


def change_optimizer(folder: str, optimizers: tuple[str, str], strategy: str) -> str:
    """What going on from one optimiser's states with another says; "" where it goes on."""
    for steps, optimizer in zip((2, 4), optimizers, strict=True):
        torch.manual_seed(1)
        module = nn.Sequential(nn.Linear(6, 1000), nn.Linear(1000, 1))
        settings = TrainSection(max_steps=steps, optimizer=optimizer, learning_rate=0.01)
        wanted = ParallelSection(strategy=strategy, micro_batches=3)
        try:
            fit(module, Made(VALIDATION, []), _loss, run_dir=Path(folder), settings=settings, parallel=wanted)
        except CheckpointError as error:
            return str(error)
    return ""


def test_states_that_can_not_be_taken_over_are_refused(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    """Another optimiser's were taken as they came, and its arithmetic failed; parts of 8-bit ones were a KeyError."""
    ways = (("adamw", "adamw8bit"), ("adamw8bit", "adamw"), ("adamw", "sgd"))
    for count, strategy in ((1, "ddp"), (2, "zero3")):
        for number, way in enumerate(ways[: 3 if count == 1 else 1]):
            for said in ranks(change_optimizer, count, str(tmp_path / f"{count}-{number}"), way, strategy):
                assert "another optimiser's: set train.optimizer" in said
    way = ("adamw8bit", "adamw8bit")
    for first, then in (((1, "ddp"), (2, "zero3")), ((2, "zero3"), (1, "ddp"))):
        folder = str(tmp_path / f"from-{first[0]}")
        ranks(change_optimizer, first[0], folder, way, first[1])
        for said in ranks(change_optimizer, then[0], folder, way, then[1]):
            assert "8-bit states of 0.weight are divided in another way" in said


def test_modules_begin_alike_however_their_tensors_lie(ranks: Callable[..., list[Any]]) -> None:
    """gloo knows no bool and no int16, and sent of an expanded tensor what lies behind it in memory."""
    first, second = ranks(take_any_layout, 2)
    assert second == {**first, "behind": [2.0, 2.0]}
    assert (first["mask"], first["short"], first["same"]) == ([True, True], 7, [1.0] * 4)
    assert first["turned"] == [[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]]


def train_twice(folder: str) -> list[float | None]:
    """The losses of two runs of one module."""
    module, settings = _network(), TrainSection(max_steps=2, learning_rate=0.02)
    wanted = ParallelSection(strategy="zero3" if os.environ["WORLD_SIZE"] == "2" else "ddp", micro_batches=3)
    train = partial(fit, module, Made(VALIDATION, []), _loss, settings=settings, parallel=wanted)
    return [train(run_dir=Path(folder, name)).loss for name in "ab"]


def test_a_module_that_was_sharded_is_sharded_again(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    (alone,) = ranks(train_twice, 1, str(tmp_path / "one"))
    for losses in ranks(train_twice, 2, str(tmp_path / "two")):
        np.testing.assert_allclose(losses, alone, rtol=1e-5)


def test_what_can_not_be_done_is_said(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    (message, _) = ranks(resumed_with_another_width, 2, str(tmp_path))
    assert "started with 3 batches a step" in message
    assert "go on with 2: set parallel.micro_batches" in message
    for said in ranks(refusals, 2, str(tmp_path / "refused")):
        for words, text in zip(
            (
                "1 is a BatchNorm1d",
                "train.optimizer_in_backward frees gradients",
                "other.weight got no gradient",
                "without calling it",
                "other.weight got no gradient",
                "every parameter is frozen",
                "middle.weight is not contiguous",
                "at most 1 rows, of which 2 processes",
                "middle.weight is a parameter of layers.1.* too",
                "do not agree on module.scale",
                "do not agree on buffers.scale",
            ),
            said,
            strict=True,
        ):
            assert words in text


@pytest.mark.parametrize(
    ("parallel", "words"), [({"tensor": 2}, "cut language models only"), ({"engine": "deepspeed"}, "DeepSpeedUpdater")]
)
def test_what_is_for_language_models_is_refused(parallel: dict[str, Any], words: str) -> None:
    with pytest.raises(ParallelError, match=words):
        data_parallel(ParallelSection(**parallel))
