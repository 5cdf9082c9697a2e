"""Which documents a step trains on: a pure function, every document once an epoch."""

from __future__ import annotations

import numpy as np
import pytest

from tunesmith.errors import DataError
from tunesmith.recipe.schema import DataSection, TrainSection
from tunesmith.train.order import DataOrder

LENGTHS = np.random.default_rng(0).integers(4, 60, 101)


def _order(**train: object) -> DataOrder:
    return DataOrder(LENGTHS, DataSection(max_length=64), TrainSection(**train), 128)


def test_every_document_is_in_each_epoch_once_and_windows_do_not_cross_epochs() -> None:
    order = _order(epochs=3.0, accumulation=4)
    windows = [order.window(step) for step in range(order.total_steps)]
    for epoch in range(3):
        own = [window for window in windows if window.epoch == epoch]
        documents = [document for window in own for pack in window.packs for document in pack]
        assert sorted(documents) == list(range(len(LENGTHS)))
        assert all(len(window.packs) == 4 for window in own[:-1])
        assert 1 <= len(own[-1].packs) <= 4
        assert [window.ends_epoch for window in own] == [False] * (len(own) - 1) + [True]
        assert own[-1].epoch_position == epoch + 1
    first, second = ([w.packs for w in windows if w.epoch == epoch] for epoch in (0, 1))
    assert first != second


def test_a_step_is_found_again_without_those_before_it() -> None:
    order = _order(epochs=3.0, accumulation=4)
    last = order.total_steps - 1
    assert _order(epochs=3.0, accumulation=4).window(last) == order.window(last)
    assert _order(epochs=3.0, accumulation=4, seed=1).window(last) != order.window(last)


def test_steps_are_counted_for_parts_of_an_epoch() -> None:
    one = _order(epochs=1.0).total_steps
    assert _order(epochs=0.5).total_steps == -(-one // 2)
    assert one < _order(epochs=1.5).total_steps < 2 * one + 1


def test_max_steps_goes_on_over_as_many_epochs_as_it_takes() -> None:
    one = _order(epochs=1.0).total_steps
    order = _order(max_steps=5 * one, epochs=1.0)
    assert order.total_steps == 5 * one
    assert order.window(5 * one - 1).epoch >= 3
    assert order.window(5 * one - 1).ends_epoch


def test_no_documents_is_an_error() -> None:
    with pytest.raises(DataError, match="no document"):
        DataOrder(np.zeros(0, dtype=np.int64), DataSection(), TrainSection(), 1024)
