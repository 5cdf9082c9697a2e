"""Whose frozen objects there are."""

from __future__ import annotations

import gc

import pytest

from tunesmith.watch.frozen_objects import somebody_froze


@pytest.mark.parametrize(("count", "answer"), [(0, False), (375, False), (60_000, True)])
def test_a_few_are_the_interpreters(count: int, answer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "get_freeze_count", lambda: count)
    assert somebody_froze() is answer
