"""Runs of several processes: the batches, losses and outcome of one, and states that any number goes on from."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tunesmith.checkpoint.load import load_decoder
from tunesmith.errors import NonFiniteError
from tunesmith.recipe.load import recipe_from_mapping
from tunesmith.rundir.io import read_jsonl
from tunesmith.rundir.layout import RunDir
from tunesmith.train.directories import RANKS
from tunesmith.train.metrics import StepMetrics
from tunesmith.train.run import train
from tunesmith.train.session import Session

STEPS = 8


def _recipe(model: str, output: str, kind: str = "full", strategy: str = "zero3", **parallel: Any) -> dict[str, Any]:
    return {
        "name": "several",
        "output": output,
        "model": {"path": model, "device": "cpu"},
        "method": {"kind": kind, "rank": 4} if kind != "full" else {"kind": "full"},
        "data": {
            "train": ["builtin:shop?rows=60&seed=1"],
            "max_length": 320,
            "train_on": "all",
            "validation_fraction": 0.1,
            "workers": 0,
        },
        "train": {"max_steps": STEPS, "micro_batch_tokens": 480, "learning_rate": 1e-3},
        "evaluation": {"max_batches": 3},
        "checkpoint": {"every_steps": 3},
        "log": {"trackers": []},
        "parallel": {"strategy": strategy, "micro_batches": 4, **parallel},
    }


def run(recipe: dict[str, Any], resume: str | None = None, stop_after: int | None = None) -> dict[str, Any]:
    """Train, all of it or until a signal reaches the last process after a step; what came of it."""
    seen: list[list[tuple[int, ...]]] = []
    original = Session.host_window

    def watched(session: Session, step: int) -> Any:
        host = original(session, step)
        seen.append([step, *host.window.packs])  # type: ignore[list-item]
        return host

    def on_step(metrics: StepMetrics) -> None:
        is_last = os.environ.get("RANK") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)
        if metrics.step == stop_after and is_last:
            os.kill(os.getpid(), signal.SIGTERM)

    Session.host_window = watched  # type: ignore[method-assign]
    try:
        result = train(recipe_from_mapping(recipe), resume=resume, on_step=on_step, quiet=True)
    finally:
        Session.host_window = original  # type: ignore[method-assign]
    own = result.run_dir
    rows = read_jsonl(RunDir(own).metrics)
    losses = {row["step"]: row["loss"] for row in rows if row["event"] == "step"}
    validation = [row["validation_loss"] for row in rows if row["event"] == "validation"]
    place = own if os.environ.get("RANK", "0") == "0" else own.parent.parent
    return {
        "run": str(place),
        "losses": losses,
        "validation": validation,
        "seen": seen,
        "exit": result.exit_code,
        "final": str(result.final),
    }


CASES = [
    ("full", "zero3", {}),
    ("lora", "ddp", {}),
    ("lora", "auto", {"tensor": 2}),
    ("qlora", "auto", {"pipeline": 2}),
]
MORE_CASES = [("qlora", "zero3", {}), ("full", "auto", {"tensor": 2}), ("full", "auto", {"pipeline": 2})]
"""Of `make test-long`."""


@pytest.fixture(scope="module")
def one_rank(
    ranks: Callable[..., list[Any]],
    tiny_model_dir: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], dict[str, Any]]:
    """The run of one process, by its method: made once for all that are compared with it."""

    @cache
    def alone(kind: str) -> dict[str, Any]:
        output = str(tmp_path_factory.mktemp("one"))
        (outcome,) = ranks(run, 1, _recipe(str(tiny_model_dir("qwen2")), output, kind, "auto"))
        return outcome

    return alone


@pytest.mark.parametrize(
    ("kind", "strategy", "parallel"), [*CASES, *(pytest.param(*case, marks=pytest.mark.long) for case in MORE_CASES)]
)
def test_two_processes_make_the_run_of_one(
    ranks: Callable[..., list[Any]],
    tiny_model_dir: Callable[..., Path],
    tmp_path: Path,
    kind: str,
    strategy: str,
    parallel: dict[str, Any],
    one_rank: Callable[[str], dict[str, Any]],
) -> None:
    model = str(tiny_model_dir("qwen2"))
    alone = one_rank(kind)
    first, second = ranks(run, 2, _recipe(model, str(tmp_path / "two"), kind, strategy, **parallel))
    assert list(first["losses"]) == list(second["losses"]) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(first["losses"].values()), list(alone["losses"].values()), rtol=1e-5)
    np.testing.assert_allclose(first["validation"], alone["validation"], rtol=1e-5)
    assert first["losses"] == second["losses"]
    assert Path(first["run"], RANKS, "rank-1").is_dir()
    assert first["run"] == second["run"]
    if kind == "full":
        one, two = load_decoder(Path(alone["final"])), load_decoder(Path(first["final"]))
        for name, weight in one.named_parameters():
            np.testing.assert_allclose(two.get_parameter(name).detach(), weight.detach(), rtol=2e-4, atol=2e-6)


Link = tuple[int, str, dict[str, int], int | None]
"""Processes, strategy, the rest of the layout, and the step after which they are stopped."""
NUMBERS: list[Link] = [(1, "zero3", {}, 2), (2, "zero3", {}, 4), (4, "zero3", {}, 6), (1, "zero3", {}, None)]
LAYOUTS: list[Link] = [
    (1, "zero3", {}, 1),
    (2, "zero3", {}, 3),
    (2, "auto", {"tensor": 2}, 4),
    (2, "auto", {"pipeline": 2}, 6),
    (4, "auto", {"pipeline": 2, "tensor": 2}, 7),
    (1, "auto", {}, None),
]
BACK: list[Link] = [
    (4, "auto", {"pipeline": 2, "tensor": 2}, 2),
    (4, "zero1", {"tensor": 2}, 4),
    (4, "auto", {"pipeline": 2}, 6),
    (2, "ddp", {}, None),
]


@pytest.mark.parametrize(
    ("kind", "chain"),
    [
        ("full", NUMBERS),
        ("full", LAYOUTS),
        *(pytest.param(*case, marks=pytest.mark.long) for case in (("full", BACK), ("lora", LAYOUTS))),
    ],
    ids=["one-two-four-one", "data-tensor-pipeline", "products", "data-tensor-pipeline-lora"],
)
def test_a_chain_of_layouts_sees_every_sample_once_in_the_same_order(
    ranks: Callable[..., list[Any]],
    tiny_model_dir: Callable[..., Path],
    tmp_path: Path,
    one_rank: Callable[[str], dict[str, Any]],
    kind: str,
    chain: list[Link],
) -> None:
    """A signal to the last process stops all after the same step; the state is gone on with by another layout.

    The bug: stages whose matrices are shared took targets of other tokens than their own, where packs were shorter
    than others (on a CPU, which leaves a pack's tail out), and the loss was wrong by a thousandth.
    """
    model = str(tiny_model_dir("qwen2"))
    alone = one_rank(kind)
    order: dict[int, Any] = {}
    losses: dict[int, float] = {}
    place: str | None = None
    for count, strategy, layout, stop in chain:
        recipe = _recipe(model, str(tmp_path / "chain"), kind, strategy, **layout)
        outcomes = ranks(run, count, recipe, place, stop)
        place = outcomes[0]["run"]
        assert {outcome["exit"] for outcome in outcomes} == {0 if stop is None else 128 + signal.SIGTERM}
        trained = {step for step in outcomes[0]["losses"] if step not in losses}
        losses.update(outcomes[0]["losses"])
        for step, *packs in outcomes[0]["seen"]:
            if step + 1 in trained:
                assert step not in order, "a step was trained twice"
                order[step] = packs
    assert order == {step: packs for step, *packs in alone["seen"]}
    np.testing.assert_allclose(
        [losses[step] for step in range(1, STEPS + 1)], list(alone["losses"].values()), rtol=1e-5
    )


def poisoned(recipe: dict[str, Any], bad_rank: str, at_step: int) -> str:
    """NaN in the loss of one process; what the process that calls says of it."""
    from tunesmith.train import session as session_module

    original = session_module.language_model_loss
    calls = 0

    def loss(module: Any, batch: Any, chunk: int) -> Any:
        nonlocal calls
        calls += 1
        value, count = original(module, batch, chunk)
        return (value * float("nan") if os.environ["RANK"] == bad_rank and calls > at_step * 2 else value), count

    session_module.language_model_loss = loss
    try:
        train(recipe_from_mapping(recipe), quiet=True)
    except NonFiniteError as error:
        return str(error)
    finally:
        session_module.language_model_loss = original
    return "trained on"


def test_nan_in_one_process_stops_all_before_the_update(
    ranks: Callable[..., list[Any]], tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = _recipe(str(tiny_model_dir("qwen2")), str(tmp_path))
    other, bad = ranks(poisoned, 2, recipe, "1", 4)
    assert "step 5: the loss is nan; nothing was updated" in bad
    assert "step 5: the loss of another process is nan" in other
