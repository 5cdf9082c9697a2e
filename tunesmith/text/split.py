"""Training and validation parts: of files of their own, or split by content and seed alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tunesmith.errors import DataError
from tunesmith.recipe.schema import DataSection
from tunesmith.text.store import DocumentStore
from tunesmith.text.summary import Progress
from tunesmith.text.tokenise import load_store, nothing_left
from tunesmith.text.tokenizer import Tokenizer


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
    held = held_out(store.hashes[:: 1 + pairs], data.validation_fraction, seed)
    return Part(store, everything[~held]), Part(store, everything[held]) if held.any() else None, cached


def _whole(store: DocumentStore, pairs: bool) -> Part:
    return Part(store, np.arange(len(store) // (1 + pairs), dtype=np.int64))


def held_out(hashes: NDArray[np.uint64], fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which documents are kept for validation: about `fraction`, chosen by content, equal ones on the same side.

    None where the fraction is less than one document (so few rows are all needed), and never all of them.
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
