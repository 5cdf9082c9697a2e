"""What a cell measures, against what is known: a sleep, an allocation, the arithmetic of costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch

from tunesmith.arch import read_config
from tunesmith.bench.cell import explain, measure, timed_step, work
from tunesmith.bench.counting import count_live_bytes
from tunesmith.bench.owners import owner_bytes, with_activations
from tunesmith.cost.memory import state_bytes
from tunesmith.cost.params import count_parameters, trainable_parameters
from tunesmith.recipe.schema import Recipe
from tunesmith.train.session import Session, build_session

MakeRecipe = Callable[..., Recipe]


def session_of(recipe: Recipe) -> Session:
    return build_session(recipe.model_copy(update={"train": recipe.train.model_copy(update={"max_steps": 8})}))


def test_a_known_sleep_is_measured(tiny_recipe: MakeRecipe) -> None:
    """Of the sleep and of the step in it, by a clock of the test's own; a busy machine takes no part in either."""
    session = session_of(tiny_recipe())
    session.step()
    step = session.step
    inner_s: list[float] = []

    def slow_step() -> Any:
        began = time.perf_counter()
        time.sleep(0.3)
        done = step()
        inner_s.append(time.perf_counter() - began)
        return done

    session.step = slow_step  # type: ignore[method-assign]
    measured_s = [timed_step(session)[1] for _ in range(3)]
    session.close()
    assert min(measured_s) >= 0.3
    assert min(outer - inner for outer, inner in zip(measured_s, inner_s, strict=True)) < 0.1


def test_a_known_allocation_is_counted(tiny_recipe: MakeRecipe) -> None:
    """A 10 MB buffer that the forward pass makes and drops raises the peak by what it adds to it."""
    session = session_of(tiny_recipe())
    session.step()
    before = count_live_bytes(session)

    def waste(*_: object) -> None:
        torch.zeros(10_000_000, dtype=torch.uint8)

    session.module.register_forward_pre_hook(waste)
    after = count_live_bytes(session)
    session.close()
    # Gradients are not alive in the forward pass, so the new peak holds the weights and the buffer, but not all of
    # what the old peak held.
    assert 10_000_000 < after <= before + 10_000_000


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "mixtral"])
@pytest.mark.parametrize("kind", ["full", "lora", "lora-fp8", "qlora"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_owners_equal_the_arithmetic(tiny_recipe: MakeRecipe, family: str, kind: str, optimizer: str) -> None:
    if (family, optimizer) == ("mixtral", "sgd"):
        pytest.skip("the optimiser does not depend on the family")
    kind, _, base = kind.partition("-")
    recipe = tiny_recipe(
        family, method={"kind": kind, "rank": 4, "base": base or "checkpoint"}, train={"optimizer": optimizer}
    )
    session = session_of(recipe)
    session.step()
    found = owner_bytes(session.module, session.optimizer)
    session.close()
    config = read_config(session.model_directory)
    expected = state_bytes(config, recipe.method, weight_dtype="float32", optimizer=optimizer)  # type: ignore[arg-type]
    assert found["adapters_bytes"] == expected.adapters
    assert found["gradients_bytes"] == expected.gradients
    assert found["weights_bytes"] == expected.weights
    steps = 4 * len(session.trained_weights()) if optimizer == "adamw" else 0  # AdamW counts its steps per tensor
    assert found["optimizer_bytes"] - steps == expected.optimizer
    summary = session.method_summary
    assert summary.total_parameters - expected.adapters // 4 == count_parameters(config).total
    assert summary.trainable_parameters == trainable_parameters(config, recipe.method)


def test_a_cell_has_every_measurement(tiny_recipe: MakeRecipe) -> None:
    cell = measure(tiny_recipe(train={"max_steps": 5}, method={"rank": 4}).model_dump(mode="json"))
    assert len(cell["times"]["steps_s"]) == 4
    assert cell["times"]["total_s"] == sum(cell["times"]["steps_s"])
    assert cell["times"]["first_step_s"] == cell["times"]["warmup_steps_s"][0]
    assert len(cell["losses"]["training"]) == 5
    assert cell["losses"]["validation"] > 0
    assert cell["work"]["tokens"] == 4 * 128
    owned = cell["owners"]
    assert sum(owned.values()) == cell["memory"]["allocated_peak_bytes"]
    assert owned["activations_bytes"] > 0
    assert cell["memory"]["resident_peak_bytes"] > cell["memory"]["allocated_peak_bytes"]
    assert cell["memory"]["allocated_source"] == "live storages"
    assert cell["memory"]["reserved_peak_bytes"] is None
    # 128 tokens a step, at the median step's time: a mean told another speed than the time beside it.
    assert cell["throughput"]["tokens_per_s"] == pytest.approx(128 / median(cell["times"]["steps_s"]))


def test_memory_is_not_counted_when_the_recipe_says_so(tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe(train={"max_steps": 5}, bench={"count_memory": False})
    cell = measure(recipe.model_dump(mode="json"))
    assert cell["memory"]["allocated_peak_bytes"] is None
    assert cell["owners"]["activations_bytes"] is None
    assert cell["owners"]["weights_bytes"] > 0


def test_activations_are_what_is_left_and_never_negative() -> None:
    assert with_activations({"weights_bytes": 5}, 8)["activations_bytes"] == 3
    assert with_activations({"weights_bytes": 5}, 4)["activations_bytes"] == 0
    assert with_activations({"weights_bytes": 5}, None)["activations_bytes"] is None


def test_reasons_of_failures() -> None:
    assert explain(torch.OutOfMemoryError("CUDA out of memory. Tried"))[0] == "out_of_memory"
    assert explain(MemoryError())[0] == "out_of_memory"
    for words in ("not enough memory", "can't allocate memory"):  # torch says either, as the platform has it
        cpu = RuntimeError(f"DefaultCPUAllocator: {words}: you tried to allocate 8 bytes")
        assert explain(cpu)[0] == "out_of_memory"
    assert explain(ValueError("a\n b")) == ("failed", "ValueError: a b")


def test_work_of_no_steps_is_nothing() -> None:
    assert work([]) == {"steps": 0, "tokens": 0, "trained_tokens": 0, "samples": 0}
