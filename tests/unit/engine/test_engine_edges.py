"""What strangers would try on the engine's loop: decoders that break, too few pages, greedy guesses, long queues."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tunesmith.engine.collection import FrozenWhileBusy
from tunesmith.engine.engine import Engine
from tunesmith.engine.request import Completion, SamplingParams
from tunesmith.errors import RequestError

Make = Callable[..., Engine]
AHEAD = pytest.mark.parametrize("step_ahead", [False, True], ids=["plainly", "ahead"])


def finish(engine: Engine, most: int = 2000) -> dict[int, Completion]:
    done: dict[int, Completion] = {}
    for _ in range(most):
        if not engine.has_work:
            break
        done.update({o.request_id: o.completion for o in engine.step() if o.completion})
    assert not engine.has_work, "the engine does not come to an end"
    engine.scheduler.check()
    assert engine.runner.pages.num_used == 0
    return done


def expected(prompt: Sequence[int], num: int) -> list[int]:
    return [(prompt[-1] + 1 + i) % 100 for i in range(num)]


class Unwell:
    """A decoder that breaks at token 13, and at the end."""

    def put(self, token: int) -> str:
        if token == 13:
            raise ValueError("13 is no text")
        return ""

    def finish(self) -> str:
        raise ValueError("nothing can be told")


@AHEAD
def test_a_decoder_that_breaks_at_the_end_too_fails_its_request_alone(counting: Make, step_ahead: bool) -> None:
    """The second error, while the first was told, dropped all requests; one of an abort kept its pages for ever."""
    engine = counting(3, step_ahead=step_ahead, parts={"make_decoder": lambda request: Unwell()})
    ids = [engine.submit([t], SamplingParams(max_tokens=5)) for t in (10, 30, 50)]
    for _ in range(3):
        done = {o.request_id: o.completion for o in engine.step() if o.completion}
    assert engine.abort(ids[2]) is not None
    done |= finish(engine)
    first, second = done[ids[0]], done[ids[1]]
    assert first is not None and (first.finish_reason, first.error) == ("error", "13 is no text")
    assert second is not None and (second.finish_reason, second.error) == ("error", "nothing can be told")


def test_a_request_that_the_pages_never_hold_is_refused(counting: Make) -> None:
    """It was preempted for itself for ever."""
    engine = counting(2, 128, num_pages=3, enable_prefix_cache=False)
    with pytest.raises(RequestError, match="the cache holds 48 tokens"):
        engine.submit([1], SamplingParams(max_tokens=60))
    with pytest.raises(RequestError, match="no room for an answer"):
        engine.submit([1] * 48, SamplingParams())
    whole = engine.submit([1], SamplingParams())
    assert len(finish(engine)[whole].token_ids) == 47


class Eager:
    """Guesses as much as it may, all right."""

    max_drafts = 3

    def propose(self, sequences: Any) -> list[list[int]]:
        return [[(s.all_ids[-1] + i) % 100 for i in range(1, 4)] for s in sequences]

    def forget(self, request_id: int) -> None:
        return


def test_guesses_take_no_other_requests_turn(counting: Make) -> None:
    """The first requests' guesses filled the budget of every step, so that the last waited for the first to end."""
    engine = counting(4, 64, max_num_batched_tokens=4, parts={"drafter": Eager()})
    ids = [engine.submit([10 * i], SamplingParams(max_tokens=20)) for i in range(4)]
    while not all(s.num_missing == 1 and s.num_generated for s in engine.scheduler.running):
        engine.step()
    for _ in range(3):
        heard = {output.request_id for output in engine.step()}
        assert heard == set(ids), "every request goes on in every step"
    done = finish(engine)
    assert [done[i].token_ids for i in ids] == [expected([10 * i], 20) for i in range(4)]


def test_guesses_throw_nobody_out(counting: Make) -> None:
    """Pages for guesses were taken from a request that ran."""
    engine = counting(2, 32, num_pages=2, parts={"drafter": Eager()}, enable_prefix_cache=False)
    ids = [engine.submit([20 * i + j for j in range(14)], SamplingParams(max_tokens=n)) for i, n in enumerate((18, 2))]
    done = finish(engine)
    assert [done[i].token_ids for i in ids] == [expected([13], 18), expected([33], 2)]
    assert engine.stats().num_preempted == 0


@AHEAD
def test_nobody_takes_the_pages_of_one_that_gave_way_a_moment_ago(counting: Make, step_ahead: bool) -> None:
    """While its last token was on the way, a step ahead, one that came later was let in before it."""
    engine = counting(2, 64, num_pages=4, step_ahead=step_ahead, enable_prefix_cache=False)
    first, second = (engine.submit([50 * i + j for j in range(8)], SamplingParams(max_tokens=40)) for i in range(2))
    third = engine.submit([90], SamplingParams(max_tokens=4))
    done: dict[int, Completion] = {}
    while engine.has_work:
        done.update({o.request_id: o.completion for o in engine.step() if o.completion})
        waiting = [sequence.request_id for sequence in engine.scheduler.waiting]
        running = [sequence.request_id for sequence in engine.scheduler.running]
        assert not (second in waiting and third in running)
    assert done[second].token_ids == expected([57], 40) and done[third].token_ids == expected([90], 4)
    assert engine.stats().num_preempted == 1 and next(iter(done)) == first


@AHEAD
def test_a_long_queue_costs_a_step_nothing(counting: Make, step_ahead: bool) -> None:
    """Every step copied all that waited."""
    engine = counting(1, step_ahead=step_ahead)
    for _ in range(50):
        engine.submit([1], SamplingParams(max_tokens=9))
    engine.step()
    looked = _Counted(engine.scheduler.waiting)
    engine.scheduler.waiting = looked
    for _ in range(5):
        engine.step()
    assert looked.num_looks < 20
    engine.scheduler.waiting = list(looked)
    for request_id in range(1, 51):
        engine.abort(request_id)


def test_objects_that_the_interpreter_froze_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.12 begins with 375; the engine took them for somebody's, froze nothing, and stood still for 110 ms."""
    gc.unfreeze()
    frozen = FrozenWhileBusy()
    with monkeypatch.context() as patch:
        patch.setattr("tunesmith.engine.collection.gc.get_freeze_count", lambda: 375)
        frozen.begin()
    assert gc.get_freeze_count() > 1000
    frozen.end()
    assert gc.get_freeze_count() == 0


def test_what_was_there_is_frozen_while_requests_run(counting: Make) -> None:
    """A full collection in the middle of a step takes 100 ms with a model loaded."""
    gc.unfreeze()  # what other tests have left
    engine = counting(2, step_ahead=True)
    ids = [engine.submit([i], SamplingParams(max_tokens=5)) for i in (1, 2, 3)]
    engine.step()
    assert gc.get_freeze_count() > 1000
    engine.abort(ids[0])
    finish(engine)
    assert gc.get_freeze_count() == 0
    last = engine.submit([1], SamplingParams(max_tokens=5))
    engine.abort(last)
    assert gc.get_freeze_count() == 0
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        engine.submit([1], SamplingParams(max_tokens=2))
        finish(engine)
        assert gc.get_freeze_count() == pytest.approx(frozen, rel=0.01), "another's are left alone"
    finally:
        gc.unfreeze()


class _Counted(list[Any]):
    """A list that counts what is read of it one by one."""

    num_looks = 0

    def __iter__(self) -> Any:
        for item in super().__iter__():
            self.num_looks += 1
            yield item
