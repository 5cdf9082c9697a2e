"""The cells of each matrix."""

from __future__ import annotations

from typing import Any

import pytest

from tunesmith.bench.matrix import cell_recipe, file_stem, recipe_hash, shuffled_turns
from tunesmith.bench.plans import plan_matrix
from tunesmith.errors import RecipeError
from tunesmith.recipe.load import recipe_from_mapping
from tunesmith.recipe.schema import Recipe


def recipe(**sections: Any) -> Recipe:
    return recipe_from_mapping({"data": {"train": ["x.jsonl"]}, **sections})


def test_methods_are_the_five_of_the_table() -> None:
    plans = plan_matrix(recipe())
    assert [plan.name for plan in plans] == ["full", "lora", "lora+gc", "qlora", "qlora+gc"]
    assert [plan.parent for plan in plans] == [None, "full", "lora", "full", "qlora"]
    recipes = [cell_recipe(recipe(), plan) for plan in plans]
    assert [r.method.kind for r in recipes] == ["full", "lora", "lora", "qlora", "qlora"]
    assert [r.train.checkpointing for r in recipes] == ["none", "none", "selective", "none", "selective"]
    assert {r.train.max_steps for r in recipes} == {13}


def test_products_in_fp8_go_with_every_method_that_has_them() -> None:
    for method in ({"base": "fp8"}, {"kind": "qlora", "fp8_compute": True}):
        base = recipe(method=method)
        cells = [cell_recipe(base, plan).method for plan in plan_matrix(base)]
        assert [cell.base for cell in cells] == ["checkpoint", "fp8", "fp8", "checkpoint", "checkpoint"]
        assert [cell.fp8_compute for cell in cells] == [True, False, False, True, True]


def test_full_learns_ten_times_slower_than_lora_whichever_the_recipe_is_for() -> None:
    for method, rate in (("lora", 2e-4), ("full", 2e-5)):
        base = recipe(method={"kind": method}, train={"learning_rate": rate})
        rates = [cell_recipe(base, plan).train.learning_rate for plan in plan_matrix(base)]
        assert rates == pytest.approx([2e-5, 2e-4, 2e-4, 2e-4, 2e-4])


def test_overrides_of_a_method_hold_with_checkpointing_too() -> None:
    """The comparison of LoRA with LoRA + checkpointing would not be equal otherwise."""
    base = recipe(bench={"overrides": {"lora": {"train.learning_rate": 0.01}, "lora+gc": {"method.rank": 4}}})
    cells = {plan.name: cell_recipe(base, plan) for plan in plan_matrix(base)}
    assert cells["lora"].train.learning_rate == cells["lora+gc"].train.learning_rate == 0.01
    assert (cells["lora"].method.rank, cells["lora+gc"].method.rank) == (16, 4)


def test_ladder_goes_from_float32_to_mixed_to_checkpointing() -> None:
    plans = plan_matrix(recipe(), "ladder")
    recipes = [cell_recipe(recipe(), plan) for plan in plans]
    assert [r.train.precision for r in recipes] == ["float32", "bfloat16", "bfloat16"]
    assert [r.train.checkpointing for r in recipes] == ["none", "none", "selective"]
    assert [plan.parent for plan in plans] == [None, "fp32", "mixed"]


@pytest.mark.parametrize("kind", ["selective", "block", "offload"])
def test_the_recipe_names_the_kind_of_checkpointing(kind: str) -> None:
    base = recipe(bench={"checkpointing": kind})
    for matrix, cell in (("methods", "qlora+gc"), ("ladder", "mixed+gc")):
        plans = {plan.name: plan for plan in plan_matrix(base, matrix)}
        assert plans[cell].overrides["train.checkpointing"] == kind
        assert plans[cell].gain == "checkpointing"


def test_both_kinds_of_checkpointing_stand_beside_each_other() -> None:
    base = recipe(bench={"checkpointing": "all", "overrides": {"lora": {"train.learning_rate": 0.01}}})
    cells = plan_matrix(base)
    assert [cell.name for cell in cells] == [
        "full",
        "lora",
        "lora+gc",
        "lora+block",
        "qlora",
        "qlora+gc",
        "qlora+block",
    ]
    found = {cell.name: cell_recipe(base, cell) for cell in cells}
    assert [found[f"lora+{name}"].train.checkpointing for name in ("gc", "block")] == ["selective", "block"]
    assert found["lora+block"].train.learning_rate == 0.01
    assert [cell.name for cell in plan_matrix(recipe(bench={"checkpointing": "all"}), "ladder")] == [
        "fp32",
        "mixed",
        "mixed+gc",
        "mixed+block",
    ]
    assert len({cell.label for cell in cells}) == len(cells)


def test_grid_has_each_gain_alone_and_stacked() -> None:
    grid = {"train.checkpointing": ["none", "block"], "method.kind": ["lora", "qlora"]}
    plans = plan_matrix(recipe(bench={"matrix": "grid", "grid": grid}))
    assert [(plan.name, plan.parent, plan.gain) for plan in plans] == [
        ("baseline", None, None),
        ("kind=qlora", "baseline", "kind=qlora"),
        ("checkpointing=block", "baseline", "checkpointing=block"),
        ("checkpointing=block,kind=qlora", "checkpointing=block", "kind=qlora"),
    ]


@pytest.mark.parametrize(
    ("arguments", "bench", "message"),
    [
        (("metods",), {}, "did you mean 'methods'"),
        ((None, ["lorra"]), {}, "did you mean 'lora'"),
        ((), {"overrides": {"qlora+cg": {}}}, "did you mean 'qlora"),
    ],
)
def test_mistakes_name_the_nearest(arguments: tuple[Any, ...], bench: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        plan_matrix(recipe(bench=bench), *arguments)


def test_every_round_has_every_cell_once_in_a_seeded_order() -> None:
    base = recipe()
    plans = plan_matrix(base)
    recipes = {plan.name: base for plan in plans}
    turns = shuffled_turns(plans, recipes, 4, seed=1)
    rounds = [[turn.plan.name for turn in turns if turn.repeat == repeat] for repeat in range(4)]
    assert all(sorted(names) == sorted(recipes) for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1
    assert turns == shuffled_turns(plans, recipes, 4, seed=1)
    assert turns != shuffled_turns(plans, recipes, 4, seed=2)


def test_hash_does_not_depend_on_the_order_of_keys() -> None:
    assert recipe_hash({"a": 1, "b": 2}) == recipe_hash({"b": 2, "a": 1}) != recipe_hash({"a": 1, "b": 3})


def test_file_names_of_cells_stay_in_their_folder_and_apart() -> None:
    names = ["lora+gc", "lora-gc", "path=/etc/passwd", "path=-etc-passwd", "../x", "模型", "x" * 200]
    stems = [file_stem(name) for name in names]
    assert len(set(stems)) == len(stems)
    assert all("/" not in stem and len(stem) < 100 for stem in stems)
