"""The garbage collector is off within steps, runs between them, and is as it was afterwards."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from tunesmith.train.collection import CollectedBetweenSteps


class _Cycle:
    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def _collector_as_it_was() -> Iterator[None]:
    gc.unfreeze()  # what an engine of another test may have left
    yield
    gc.unfreeze()
    gc.enable()


def test_cycles_go_every_few_steps_and_not_before() -> None:
    with CollectedBetweenSteps(every_steps=3) as collection:
        assert not gc.isenabled()
        assert gc.get_freeze_count() > 0
        garbage = weakref.ref(_Cycle())
        collection.step_queued()
        collection.step_queued()
        assert garbage() is not None
        collection.step_queued()
        assert garbage() is None
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_it_is_as_it_was_after_an_error() -> None:
    with pytest.raises(ValueError, match="stop"), CollectedBetweenSteps():
        raise ValueError("stop")
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_what_the_caller_had_set_stays() -> None:
    gc.freeze()
    gc.disable()
    frozen = gc.get_freeze_count()
    with CollectedBetweenSteps():
        pass
    assert not gc.isenabled()
    assert gc.get_freeze_count() == pytest.approx(frozen, rel=0.01)  # less what died meanwhile


def test_objects_that_the_interpreter_froze_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.12 begins with 375."""
    with monkeypatch.context() as patch:
        patch.setattr(gc, "get_freeze_count", lambda: 375)
        collection = CollectedBetweenSteps()
        collection.__enter__()
    assert gc.get_freeze_count() > 1000
    collection.__exit__(None, None, None)
    assert gc.get_freeze_count() == 0
