"""Which tokens are in the loss: shown, and refused where there are none or no end of turn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tunesmith.errors import DataError
from tunesmith.recipe.schema import Recipe
from tunesmith.text.dataset import TrainingData, load_data
from tunesmith.text.preview import check_trainable
from tunesmith.text.tokenizer import load_tokenizer
from tunesmith.verify.check import Outcome

ROWS = 32


@dataclass(frozen=True)
class MaskCounts:
    """Tokens of the documents looked at."""

    documents: int
    tokens: int
    trained: int


def mask_shown(recipe: Recipe, directory: Path) -> Outcome:
    """The share of trained tokens in the first rows; fails when none is trained, or no end of turn.

    Raises: DataError for data that can't be read at all, or a bad row.
    """
    if recipe.data.format == "tokens":
        return Outcome(None, None, "random tokens: all but the first of a document are trained", passed=True)
    first_rows = recipe.data.model_copy(
        update={"max_rows": min(ROWS, recipe.data.max_rows or ROWS), "validation": [], "validation_fraction": 0.0}
        | {"workers": 0, "cache": False}
    )
    data = load_data(first_rows, load_tokenizer(directory), seed=recipe.train.seed)
    try:
        check_trainable(data.train, data.tokenizer, first_rows)
    except DataError as error:
        return Outcome(None, None, str(error), passed=False)
    counts = _count(data)
    detail = (
        f"{counts.trained} of {counts.tokens} tokens of the first {counts.documents} documents are trained, "
        f"ends of turns among them (value: the share)"
    )
    return Outcome(counts.trained / counts.tokens, None, detail, passed=counts.trained > 0)


def _count(data: TrainingData) -> MaskCounts:
    arrays = [data.train.arrays(index) for index in range(len(data.train))]
    tokens = sum(len(ids) for ids, _ in arrays)
    return MaskCounts(len(arrays), tokens, sum(int(trained.sum()) for _, trained in arrays))
