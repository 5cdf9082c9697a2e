"""What a session trains on: documents of files, or random tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tunesmith.arch import ModelConfig
from tunesmith.checkpoint.source import resolve_tokenizer
from tunesmith.errors import RecipeError
from tunesmith.model.language_model import LanguageModel
from tunesmith.recipe.schema import DataSection, Recipe
from tunesmith.text.dataset import DataSummary, TrainingData, load_data
from tunesmith.text.split import LEAST_DOCUMENTS, fraction_of
from tunesmith.text.tokenizer import load_tokenizer
from tunesmith.train.batches import Dataset, RandomTokens

Progress = Callable[[str, int, int], None]
DEFAULT_RANDOM_ROWS = 512


@dataclass(frozen=True)
class SessionData:
    """What is trained on. `loaded` is what text made of files; None for random tokens."""

    train: Dataset
    validation: Dataset | None = None
    loaded: TrainingData | None = None

    @property
    def summary(self) -> DataSummary | None:
        """The data in numbers, where it came from files."""
        return None if self.loaded is None else self.loaded.summary


def model_vocab_size(model: LanguageModel) -> int | None:
    """Rows of the embedding, where the model says."""
    return getattr(getattr(model, "config", None), "vocab_size", None)


def data_from_files(recipe: Recipe, progress: Progress | None) -> SessionData:
    """What a resolved recipe's files hold. Raises: RecipeError, DataError, TokenizerError."""
    data = recipe.data
    if not data.train:
        raise RecipeError("data.train is empty: name a file, a folder, builtin:shop, or a Hub dataset id")
    loaded = load_data(data, load_tokenizer(resolve_tokenizer(recipe)), seed=recipe.train.seed, progress=progress)
    return SessionData(loaded.train, loaded.validation, loaded)


def random_data(recipe: Recipe, model: LanguageModel) -> SessionData:
    """Random tokens of `model`'s vocabulary. Raises: RecipeError where it has none."""
    data, vocab_size = recipe.data, model_vocab_size(model)
    if vocab_size is None:
        raise RecipeError("data.format 'tokens' needs a model whose config has vocab_size")
    count = data.max_rows or DEFAULT_RANDOM_ROWS
    train = RandomTokens(count, data.max_length, vocab_size, recipe.train.seed)
    held_out = math.ceil(min(count, 16) * fraction_of(data, LEAST_DOCUMENTS))
    if not held_out:
        return SessionData(train)
    return SessionData(train, RandomTokens(held_out, data.max_length, vocab_size, recipe.train.seed, count))


def check_positions(model: LanguageModel, data: DataSection) -> None:
    """Raises: RecipeError where documents may be longer than a model with learned positions has positions."""
    config = getattr(model, "config", None)
    if isinstance(config, ModelConfig) and config.learned_positions:
        most = config.max_position_embeddings
        if data.max_length > most:
            raise RecipeError(f"data.max_length {data.max_length} is over the model's {most} learned positions")
