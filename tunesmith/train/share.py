"""What of a step's data is a process's own: a pure function of the window and the process's place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tunesmith.recipe.schema import DataSection, Recipe
from tunesmith.train.batches import Dataset
from tunesmith.units import ceil_div

Pack = tuple[int, ...]


def packs_of_a_step(recipe: Recipe, num_data: int) -> int:
    """Micro-batches of one optimiser step, of all data-parallel processes together."""
    return recipe.parallel.micro_batches or recipe.train.accumulation * num_data


def own_packs(packs: Sequence[Pack], index: int, num_data: int) -> list[Pack]:
    """Every num_data-th pack from `index` on, empty ones added where others have one more.

    All processes then have as many forward and backward passes, as sums of gradients over them need.
    """
    own = list(packs[index::num_data])
    return own + [()] * (ceil_div(len(packs), num_data) - len(own))


def count_trained(dataset: Dataset, packs: Sequence[Pack], data: DataSection) -> int:
    """Trained tokens of these packs: as `build_micro_batch` would count them, without building anything."""
    total = 0
    for pack in packs:
        for document in pack:
            _, trained = dataset.arrays(document)
            total += int(np.count_nonzero(trained[1 : data.max_length]))
    return total


def count_tokens(dataset: Dataset, packs: Sequence[Pack], data: DataSection) -> int:
    """Tokens of the documents of these packs, fillers left out."""
    documents = [document for pack in packs for document in pack]
    return int(np.minimum(dataset.lengths[documents], data.max_length).sum()) if documents else 0
