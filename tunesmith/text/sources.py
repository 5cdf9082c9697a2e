"""Data that is made, not read: `builtin:NAME` in a recipe; with arguments `builtin:pretrain?rows=2000000&seed=1`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

from tunesmith.errors import DataError, nearest
from tunesmith.text.builtin import pretrain, shop
from tunesmith.text.builtin.vocabulary import Split
from tunesmith.text.workers import available_cores, ordered_map

Row = dict[str, Any]


_ROWS_OF_A_JOB = 2_000
_JOBS_IN_PROCESS = 10


def _pretrain(rows: int = 100_000, seed: int = 1) -> Iterator[Row]:
    return _made_in_parallel("messages", rows, seed, "pretrain")


def _pretrain_text(rows: int = 100_000, seed: int = 1) -> Iterator[Row]:
    return _made_in_parallel("text", rows, seed, "pretrain")


def _pretrain_validation(rows: int = 1_000, seed: int = 2) -> Iterator[Row]:
    return _made_in_parallel("messages", rows, seed, "validation")


def _made_in_parallel(key: str, rows: int, seed: int, split: Split) -> Iterator[Row]:
    """The rows below `rows` that are conversations ("messages") or plain texts ("text"): a source has one format."""
    jobs = ((start, min(start + _ROWS_OF_A_JOB, rows)) for start in range(0, rows, _ROWS_OF_A_JOB))
    shared = (seed, split, key)
    made = ordered_map(pretrain.rows_between, shared, jobs, workers=available_cores(), in_process=_JOBS_IN_PROCESS)
    return chain.from_iterable(made)


DEMO_SHOP = 2


def _shop(rows: int = 600, seed: int = 0, shop_number: int = DEMO_SHOP) -> Iterator[Row]:
    return shop.rows("train", seed, rows, shop_number)


def _shop_validation(rows: int = 60, seed: int = 0, shop_number: int = DEMO_SHOP) -> Iterator[Row]:
    return shop.rows("validation", seed, rows, shop_number)


def _shop_heldout(rows: int = 100, seed: int = 0, shop_number: int = DEMO_SHOP) -> Iterator[Row]:
    return shop.rows("heldout", seed, rows, shop_number)


def _shop_shuffled(rows: int = 100, seed: int = 0, shop_number: int = DEMO_SHOP) -> Iterator[Row]:
    return shop.rows("heldout", seed, rows, shop_number, shuffled=True)


# name (without "builtin:") -> a function that yields rows, each in one of the formats files may have.
SOURCES: dict[str, Callable[..., Iterable[Row]]] = {
    "pretrain": _pretrain,
    "pretrain-text": _pretrain_text,
    "pretrain-validation": _pretrain_validation,
    "shop": _shop,
    "shop-validation": _shop_validation,
    "shop-heldout": _shop_heldout,
    "shop-shuffled": _shop_shuffled,
}


def builtin_rows(address: str) -> Iterable[Row]:
    """The rows of `NAME` or `NAME?key=value&key=value` (without "builtin:"); values are whole numbers.

    Raises: DataError for an unknown name or argument.
    """
    name, _, query = address.partition("?")
    if name not in SOURCES:
        known = ", ".join(f"builtin:{one}" for one in SOURCES)
        raise DataError(f"builtin:{name} is not built-in data{nearest(name, SOURCES)}; there are: {known}")
    source = SOURCES[name]
    return source(**_arguments(name, query, tuple(inspect.signature(source).parameters)))


def _arguments(name: str, query: str, allowed: tuple[str, ...]) -> dict[str, int]:
    arguments: dict[str, int] = {}
    for part in query.split("&") if query else []:
        key, _, text = part.partition("=")
        if key not in allowed:
            raise DataError(
                f"builtin:{name} has no argument {key!r}{nearest(key, allowed)}; it takes: {', '.join(allowed)}"
            )
        if not text.isdecimal():
            raise DataError(f"builtin:{name}?{key} must be a whole number, got {text!r}")
        arguments[key] = int(text)
    return arguments
