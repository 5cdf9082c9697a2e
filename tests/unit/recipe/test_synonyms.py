"""Names that other libraries have for a recipe's keys."""

from __future__ import annotations

import pytest

from tunesmith.errors import RecipeError
from tunesmith.recipe.explain import all_keys
from tunesmith.recipe.load import recipe_from_mapping
from tunesmith.recipe.schema import Recipe
from tunesmith.recipe.synonyms import _NAMES, _NOTES, known_elsewhere


@pytest.mark.parametrize(
    ("guess", "key"),
    [
        ("train.save_every", "checkpoint.every_steps"),
        ("train.save_steps", "checkpoint.every_steps"),
        ("checkpoint.save_steps", "checkpoint.every_steps"),
        ("train.checkpoint_every", "checkpoint.every_steps"),
        ("checkpoint.save_total_limit", "checkpoint.keep"),
        ("train.logging_steps", "log.every_steps"),
        ("train.eval_steps", "evaluation.every_steps"),
        ("num_train_epochs", "train.epochs"),
        ("train.gradient_accumulation_steps", "train.accumulation"),
        ("train.learning-rate", "train.learning_rate"),
        ("learning_rate", "train.learning_rate"),
        ("train.lr", "train.learning_rate"),
        ("train.max_seq_length", "data.max_length"),
        ("data.cutoff_len", "data.max_length"),
        ("method.lora_rank", "method.rank"),
        ("method.r", "method.rank"),
        ("lora_alpha", "method.alpha"),
        ("model.model_name_or_path", "model.path"),
        ("lora.r", "method"),
    ],
)
def test_a_name_of_another_library_leads_to_ours(guess: str, key: str) -> None:
    """train.save_steps was told all the keys of train, and never of checkpoint.every_steps."""
    with pytest.raises(RecipeError, match=rf"is not a key, did you mean '{key}'\?$"):
        recipe_from_mapping({}, [f"{guess}=1"])


@pytest.mark.parametrize(
    ("guess", "hint"),
    [
        ("train.per_device_train_batch_size", r"'train\.micro_batch_tokens' \(it counts tokens, not rows\)\?$"),
        ("train.warmup_steps", r"'train\.warmup_ratio' \(a share of the steps\)\?$"),  # it was 'bench.warmup_steps'
        ("train.save_strategy", r"'checkpoint\.every_steps' \(a number of steps\)\?$"),
    ],
)
def test_values_of_another_kind_are_said(guess: str, hint: str) -> None:
    with pytest.raises(RecipeError, match=hint):
        recipe_from_mapping({}, [f"{guess}=1"])


def test_a_key_of_several_sections_names_them_all() -> None:
    """train.every_steps was told of evaluation.every_steps alone."""
    hint = "did you mean 'evaluation.every_steps', 'checkpoint.every_steps' or 'log.every_steps'?"
    with pytest.raises(RecipeError, match=hint.replace(".", r"\.").replace("?", r"\?")):
        recipe_from_mapping({}, ["train.every_steps=5"])


def test_what_is_named_is_there_and_no_name_is_ours_or_twice() -> None:
    names = [name for text in _NAMES.values() for name in text.split()]
    assert len(names) == len(set(names))
    assert set(_NAMES) <= {*all_keys(), *Recipe.model_fields}
    assert set(_NOTES) <= set(names)
    ours = {key.rpartition(".")[2] for key in all_keys()}
    assert ours & set(names) == {"warmup_steps"}  # the bench's: steps left out of its timing
    assert known_elsewhere("nothing_of_the_kind") is None
