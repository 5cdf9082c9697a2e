"""Autos become values, in a new recipe."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tunesmith.errors import RecipeError
from tunesmith.recipe.load import recipe_from_mapping
from tunesmith.train import resolve as resolve_module
from tunesmith.train.resolve import resolve_recipe
from tunesmith.train.run import check_resumable


def _resolved(**sections: dict[str, Any]) -> Any:
    return resolve_recipe(recipe_from_mapping({"model": {"device": "cpu"}, **sections}))


def test_a_cpu_computes_in_float32_and_the_recipe_asked_for_is_left_alone() -> None:
    asked = recipe_from_mapping({"model": {"device": "cpu"}})
    resolved = resolve_recipe(asked)
    assert asked.train.precision == "auto"
    assert (resolved.train.precision, resolved.train.master_weights, resolved.model.dtype) == ("float32",) * 3
    assert resolve_recipe(resolved) == resolved


@pytest.mark.parametrize(("max_length", "tokens"), [(1024, 2048), (2048, 2048), (700, 2100), (4096, 4096)])
def test_a_micro_batch_is_a_multiple_of_the_longest_document(max_length: int, tokens: int) -> None:
    assert _resolved(data={"max_length": max_length}).train.micro_batch_tokens == tokens


def test_trained_weights_are_wide_and_frozen_ones_as_computed_with() -> None:
    train = {"precision": "bfloat16"}
    assert _resolved(train=train, method={"kind": "full"}).model.dtype == "float32"
    assert _resolved(train=train, method={"kind": "lora"}).model.dtype == "bfloat16"
    pure = {**train, "master_weights": "compute"}
    assert _resolved(train=pure, method={"kind": "full"}).model.dtype == "bfloat16"
    asked = _resolved(train=train, model={"device": "cpu", "dtype": "float16"})
    assert asked.model.dtype == "float16"


def test_a_gpu_computes_in_bfloat16_where_it_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve_module, "pick_device", lambda asked: torch.device("cuda", 0))
    for has, precision in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(resolve_module, "supports_bf16", lambda device, has=has: has)
        resolved = resolve_recipe(recipe_from_mapping({}))
        assert (resolved.train.precision, resolved.model.device) == (precision, "cuda:0")
        assert resolved.train.micro_batch_tokens == 8192


def test_only_keys_that_change_nothing_may_change_at_a_resume() -> None:
    before = _resolved()
    for free in ({"checkpoint": {"keep": 5}}, {"log": {"every_steps": 7}}, {"name": "other"}):
        check_resumable(before, _resolved(**free))
    for key, changed in (
        ("train.seed", {"train": {"seed": 1}}),
        ("data.max_length", {"data": {"max_length": 64}}),
        ("method.rank", {"method": {"rank": 2}}),
        ("method.targets", {"method": {"targets": ["q_proj"]}}),
    ):
        with pytest.raises(RecipeError, match=f"the run was started with {key}"):
            check_resumable(before, _resolved(**changed))


def test_a_switch_of_the_template_that_is_gone_is_a_change() -> None:
    """Only the keys that the new recipe has were compared."""
    before = _resolved(data={"template_arguments": {"a": 1, "b": 2}})
    with pytest.raises(RecipeError, match=r"started with data\.template_arguments\.b"):
        check_resumable(before, _resolved(data={"template_arguments": {"a": 1}}))
