"""Training and validation parts: of files of their own, or split by content and seed alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tunesmith.errors import DataError
from tunesmith.recipe.schema import DataSection
from tunesmith.text.places import name_place
from tunesmith.text.store import DocumentStore
from tunesmith.text.summary import Progress
from tunesmith.text.tokenise import load_store, nothing_left
from tunesmith.text.tokenizer import Tokenizer

FRACTION, LEAST_DOCUMENTS = 0.05, 100
"""What is kept out where the recipe doesn't say, and of how many documents at least: of few, each one counts."""
_NAMED = 3


@dataclass(frozen=True)
class Part:
    """Some examples of a store: an example is a document, or a pair of them."""

    store: DocumentStore
    examples: NDArray[np.int64]


def load_parts(
    data: DataSection, tokenizer: Tokenizer, *, seed: int, progress: Progress | None, pairs: bool = False
) -> tuple[Part, Part | None, bool]:
    """What to train on, what to validate on if anything, and whether the training store was in the cache.

    Args: `pairs`: examples are pairs of documents.
    Raises: DataError, also when nothing is left to train or to validate on.
    """
    store, cached = load_store(data, data.train, tokenizer, progress, pairs=pairs)
    if len(store) == 0:
        raise DataError(nothing_left(store.meta["tally"], data))
    if data.validation:
        held_store, _ = load_store(data, data.validation, tokenizer, progress, pairs=pairs)
        if len(held_store) == 0:
            raise DataError("data.validation: " + nothing_left(held_store.meta["tally"], data))
        return _whole(store, pairs), _whole(held_store, pairs), cached
    everything = _whole(store, pairs).examples
    held = held_out(store.hashes[:: 1 + pairs], fraction_of(data, len(everything)), seed)
    return Part(store, everything[~held]), Part(store, everything[held]) if held.any() else None, cached


def fraction_of(data: DataSection, num_examples: int) -> float:
    """The share of `num_examples` that is kept out of training: the recipe's, else FRACTION where there are enough."""
    if data.validation_fraction is not None:
        return data.validation_fraction
    return FRACTION if num_examples >= LEAST_DOCUMENTS else 0.0


def split_note(data: DataSection, held: Part | None, *, pairs: bool = False) -> str | None:
    """Which rows are kept out of training, or why none are, in a line; None where the recipe itself says it."""
    if data.validation or data.validation_fraction == 0:
        return None
    if held is not None:
        return f"kept out of training, to validate on: {_names(held, pairs)} (data.validation_fraction=0 trains on all)"
    if data.validation_fraction is None:
        return (
            f"fewer than {LEAST_DOCUMENTS} rows, so all are trained on and none is kept out to validate on "
            f"(to keep a tenth out: --set data.validation_fraction=0.1)"
        )
    return f"data.validation_fraction {data.validation_fraction:g} is less than one row here: all are trained on"


def _names(held: Part, pairs: bool) -> str:
    """The first rows of `held` by their places, and how many more there are."""
    store, documents = held.store, held.examples[:_NAMED] * (1 + pairs)
    names = [name_place(store.meta["files"][int(store.files[i])], int(store.places[i])) for i in documents]
    more = len(held.examples) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")


def _whole(store: DocumentStore, pairs: bool) -> Part:
    return Part(store, np.arange(len(store) // (1 + pairs), dtype=np.int64))


def held_out(hashes: NDArray[np.uint64], fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which documents are kept for validation: about `fraction`, chosen by content, equal ones on the same side.

    None where the fraction is less than one document, and never all of them.
    """
    held = np.zeros(len(hashes), dtype=np.bool_)
    mixed = _mixed(hashes, seed)
    order = np.argsort(mixed, kind="stable")
    if fraction == 0 or len(hashes) == 0 or mixed[order[0]] == mixed[order[-1]]:
        return held
    want = min(math.floor(fraction * len(hashes) + 1e-9), len(hashes) - 1)
    if want == 0:
        return held
    last = mixed[order[want - 1]]
    if last == mixed[order[-1]]:
        last = mixed[mixed < last].max()
    return mixed <= last


def _mixed(hashes: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Hashes scrambled by the seed (a permutation of the 64-bit numbers: splitmix64's finaliser)."""
    with np.errstate(over="ignore"):
        z = hashes ^ np.uint64((seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & (2**64 - 1))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
