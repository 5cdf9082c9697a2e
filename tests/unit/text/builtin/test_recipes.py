"""The recipes of the repository are recipes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.arch import read_config
from tunesmith.recipe.load import load_recipe
from tunesmith.text.sources import SOURCES

RECIPES = Path(__file__).parents[4] / "recipes"
FILES = sorted(RECIPES.glob("*.yaml"))


def test_there_are_recipes():
    assert {path.stem for path in FILES} >= {
        "pretrain-tiny",
        "pretrain-probe-30m",
        "demo",
        "demo-quality",
        "qwen2.5-7b-matrix",
        "qwen2.5-14b-full-offload",
        "llama-3.2-3b-matrix",
        "llama-3.2-3b-text-matrix",
        "llama-3.1-8b-long-context",
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_recipe_is_valid(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    for address in [*recipe.data.train, *recipe.data.validation]:
        assert address.removeprefix("builtin:").partition("?")[0] in SOURCES
    if recipe.model.path.startswith("recipes/"):
        assert read_config(RECIPES.parent / recipe.model.path).vocab_size > 0


@pytest.mark.parametrize(
    ("folder", "billions"),
    [
        ("probe-30m", 0.030),
        ("configs/qwen2.5-7b", 7.62),
        ("configs/qwen2.5-14b", 14.77),
        ("configs/llama-3.2-3b", 3.21),
        ("configs/llama-3.1-8b", 8.03),
        ("configs/llama-3.1-70b", 70.6),
    ],
)
def test_shapes_have_the_parameters_they_are_named_after(folder, billions):
    config = read_config(RECIPES / folder)
    attention = config.hidden_size * config.head_dim * (config.num_attention_heads + config.num_key_value_heads) * 2
    mlp = 3 * config.hidden_size * config.intermediate_size
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    total = config.num_hidden_layers * (attention + mlp) + embeddings
    assert total / 1e9 == pytest.approx(billions, rel=0.02)
