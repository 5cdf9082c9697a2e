"""The engine's loop against a fake model whose next token is the last one plus one (conftest.py)."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tunesmith.engine.engine import Engine
from tunesmith.engine.request import Completion, SamplingParams, StructuredSpec
from tunesmith.errors import RequestError

Make = Callable[..., Engine]
AHEAD = pytest.mark.parametrize("step_ahead", [False, True], ids=["plainly", "ahead"])


def finish(engine: Engine) -> dict[int, Completion]:
    done = {}
    while engine.has_work:
        done.update({o.request_id: o.completion for o in engine.step() if o.completion})
    engine.scheduler.check()
    assert engine.runner.pages.num_used == 0
    return done


def expected(prompt: list[int], num: int) -> list[int]:
    return [(prompt[-1] + 1 + i) % 100 for i in range(num)]


@AHEAD
def test_a_request_ends_at_its_length_or_at_a_stop_token(counting: Make, step_ahead: bool) -> None:
    engine = counting(stop_ids=[7], step_ahead=step_ahead)
    long = engine.submit([10], SamplingParams(max_tokens=4))
    stopped = engine.submit([5], SamplingParams(max_tokens=10))
    ignoring = engine.submit([5], SamplingParams(max_tokens=4, ignore_eos=True))
    own = engine.submit([5], SamplingParams(max_tokens=9, ignore_eos=True, stop_token_ids=(9,)))
    late = engine.submit([5], SamplingParams(max_tokens=9, min_tokens=3, stop_token_ids=(9,)))
    done = finish(engine)
    assert (done[long].token_ids, done[long].finish_reason) == ([11, 12, 13, 14], "length")
    assert (done[stopped].token_ids, done[stopped].finish_reason) == ([6, 7], "stop")
    assert done[stopped].stop_reason is None
    assert (done[ignoring].token_ids, done[ignoring].finish_reason) == ([6, 7, 8, 9], "length")
    assert (done[own].token_ids, done[own].stop_reason) == ([6, 7, 8, 9], 9)
    assert done[late].token_ids == [6, 7, 8, 9], "7 came too early to end it"


def test_requests_are_served_in_order_one_at_a_time(counting: Make) -> None:
    engine = counting()
    ids = [engine.submit([i], SamplingParams(max_tokens=2)) for i in range(3)]
    assert list(finish(engine)) == ids
    assert {len(batch.context_R) for batch in engine.runner.batches} == {1}  # type: ignore[attr-defined]


@AHEAD
def test_several_run_together_when_there_is_room(counting: Make, step_ahead: bool) -> None:
    engine = counting(2, step_ahead=step_ahead)
    ids = [engine.submit([10 * i], SamplingParams(max_tokens=i + 2)) for i in range(3)]
    done = finish(engine)
    assert [done[i].token_ids[-1] for i in ids] == [2, 13, 24]
    assert len(engine.runner.batches[0].context_R) == 2, "the third had to wait for a slot"  # type: ignore[attr-defined]


def test_max_tokens_default_fills_the_room(counting: Make) -> None:
    engine = counting()
    request = engine.submit([0] * 30, SamplingParams())
    assert len(finish(engine)[request].token_ids) == 2


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "message"),
    [
        (32, None, "no room for an answer"),
        (40, 1, "no room for an answer"),
        (30, 3, "max_tokens of at most 2"),
        (0, 1, "no token"),
    ],
)
def test_overflow_is_refused_with_the_numbers(
    counting: Make, num_prompt: int, max_tokens: int | None, message: str
) -> None:
    engine = counting()
    with pytest.raises(RequestError, match=message):
        engine.submit([1] * num_prompt, SamplingParams(max_tokens=max_tokens))
    assert not engine.has_work


@AHEAD
def test_abort_frees_the_pages_wherever_the_request_is(counting: Make, step_ahead: bool) -> None:
    engine = counting(step_ahead=step_ahead)
    running = engine.submit([1], SamplingParams(max_tokens=9))
    waiting = engine.submit([2], SamplingParams(max_tokens=9))
    for _ in range(2 + step_ahead):
        engine.step()
    assert engine.abort(waiting) is None
    said = engine.abort(running)
    assert said is not None
    assert (said.token_ids, said.finish_reason) == ([2, 3], "abort")
    assert engine.abort(running) is None
    assert not engine.has_work
    assert engine.runner.pages.num_used == 0


def test_an_interrupted_step_drops_what_ran_and_leaves_the_engine_usable(counting: Make) -> None:
    engine = counting(fail_at=2)
    first = engine.submit([1], SamplingParams(max_tokens=9))
    engine.step()
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert engine.runner.pages.num_used == 0
    with pytest.raises(RequestError, match="send it again"):
        engine.collect([first])
    again = engine.submit([1], SamplingParams(max_tokens=1))
    assert finish(engine)[again].token_ids == [2]


def test_outputs_of_others_are_kept_for_them(counting: Make) -> None:
    engine = counting(2)
    one = engine.submit([1], SamplingParams(max_tokens=3))
    two = engine.submit([50], SamplingParams(max_tokens=3))
    mine = [o.token_id for _ in range(3) for o in engine.collect([one])]
    assert mine == [2, 3, 4]
    assert [o.token_id for o in engine.collect([two])] == [51, 52, 53]


def test_timings_add_up(counting: Make) -> None:
    engine = counting()
    engine.submit([1], SamplingParams(max_tokens=1))
    request = engine.submit([1], SamplingParams(max_tokens=5))
    timings = finish(engine)[request].timings
    assert 0 < timings.queued_s <= timings.ttft_s <= timings.total_s
    assert timings.tpot_s == pytest.approx((timings.total_s - timings.ttft_s) / 4, rel=0.5, abs=1e-3)


def test_what_is_not_there_is_refused(counting: Make) -> None:
    for options, message in (
        ({"params": SamplingParams(stop=("x",))}, "tokenizer"),
        ({"params": SamplingParams(structured=StructuredSpec("regex", "a"))}, "grammar"),
        ({"params": SamplingParams(), "adapter": "german"}, "'german' is not known"),
    ):
        with pytest.raises(RequestError, match=message):
            counting().submit([1], **options)


# One budget of tokens


@AHEAD
def test_prompts_come_in_pieces_beside_what_decodes(counting: Make, step_ahead: bool) -> None:
    engine = counting(3, 200, max_num_batched_tokens=16, step_ahead=step_ahead)
    short = engine.submit([1], SamplingParams(max_tokens=12))
    engine.step()
    long = engine.submit(list(range(60)), SamplingParams(max_tokens=3))
    done = finish(engine)
    assert done[short].token_ids == expected([1], 12) and done[long].token_ids == expected([59], 3)
    sizes = [batch.num_tokens for batch in engine.runner.batches]  # type: ignore[attr-defined]
    assert max(sizes) == 16 and sizes[1:5] == [16, 16, 16, 16], "15 of the prompt beside 1 that decodes"
    assert [len(b.sample_rows_B) for b in engine.runner.batches[1:5]] == [1, 1, 1, 2]  # type: ignore[attr-defined]


@AHEAD
def test_priority_goes_before_arrival(counting: Make, step_ahead: bool) -> None:
    engine = counting(1, step_ahead=step_ahead)
    params = SamplingParams(max_tokens=2)
    order = [engine.submit([i], params, priority=p) for i, p in enumerate((1, 0, 2, 0, 1))]
    assert list(finish(engine)) == [order[i] for i in (1, 3, 0, 4, 2)]


@AHEAD
def test_a_more_urgent_request_takes_the_place_of_a_running_one(counting: Make, step_ahead: bool) -> None:
    engine = counting(1, step_ahead=step_ahead)
    slow = engine.submit([1], SamplingParams(max_tokens=9), priority=5)
    for _ in range(3):
        engine.step()
    urgent = engine.submit([50], SamplingParams(max_tokens=2), priority=0)
    done = finish(engine)
    assert list(done) == [urgent, slow]
    assert done[slow].token_ids == expected([1], 9) and done[urgent].token_ids == [51, 52]
    assert engine.stats().num_preempted == 1


@AHEAD
def test_when_pages_run_out_the_latest_starts_again_and_says_the_same(counting: Make, step_ahead: bool) -> None:
    engine = counting(4, 64, num_pages=5, step_ahead=step_ahead, enable_prefix_cache=False)
    prompts = [[10 * i + j for j in range(8)] for i in range(4)]
    ids = [engine.submit(p, SamplingParams(max_tokens=40)) for p in prompts]
    done = finish(engine)
    assert [done[i].token_ids for i in ids] == [expected(p, 40) for p in prompts]
    assert engine.stats().num_preempted > 0
    assert min(done, key=list(done).index) == ids[0], "the first to come is never the one that gives way"


# Prefixes


@AHEAD
def test_equal_beginnings_are_computed_once(counting: Make, step_ahead: bool) -> None:
    engine = counting(4, 128, step_ahead=step_ahead)
    shared = list(range(40))
    first = engine.submit([*shared, 50], SamplingParams(max_tokens=2))
    same_step = engine.submit([*shared, 60], SamplingParams(max_tokens=2))
    done = finish(engine)
    assert (done[first].cached_tokens, done[same_step].cached_tokens) == (0, 32)
    later = engine.submit([*shared, 70], SamplingParams(max_tokens=2))
    salted = engine.submit([*shared, 70], SamplingParams(max_tokens=2), cache_salt="mine")
    done = finish(engine)
    assert (done[later].cached_tokens, done[salted].cached_tokens) == (32, 0)
    assert done[later].token_ids == done[salted].token_ids == [71, 72]
    stats = engine.stats()
    assert (stats.prefix_hits_tokens, stats.prefix_queries_tokens) == (64, 4 * 41)


def test_an_answer_can_be_gone_on_from(counting: Make) -> None:
    engine = counting(1, 128)
    first = engine.submit(list(range(20)), SamplingParams(max_tokens=30))
    said = finish(engine)[first].token_ids
    again = engine.submit([*range(20), *said, 5], SamplingParams(max_tokens=1))
    assert finish(engine)[again].cached_tokens == 48, "the last of 50 tokens was never computed"


# One request's failure


class Breaking:
    """A decoder that can't decode token 13."""

    def put(self, token: int) -> str:
        if token == 13:
            raise ValueError("13 is no text")
        return f"{token} "

    def finish(self) -> str:
        return ""


@AHEAD
def test_a_failing_request_fails_alone(counting: Make, step_ahead: bool) -> None:
    engine = counting(3, step_ahead=step_ahead, parts={"make_decoder": lambda request: Breaking()})
    engine.runner.broken = {33}  # type: ignore[attr-defined]
    texts = [engine.submit([t], SamplingParams(max_tokens=5)) for t in (10, 30, 50)]
    done = finish(engine)
    assert [done[i].finish_reason for i in texts] == ["error", "error", "length"]
    assert done[texts[0]].error == "13 is no text" and done[texts[0]].text == "11 12 "
    assert "not numbers" in (done[texts[1]].error or "") and done[texts[1]].token_ids == [31, 32, 33]
    assert done[texts[2]].text == "51 52 53 54 55 "
    assert (engine.stats().num_failed, engine.stats().num_finished) == (2, 1)


class EvenThenOdd:
    """A grammar that lets in only what comes next, and is finished after token 8."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.is_finished = False

    def mask_into(self, bitmask_row: np.ndarray) -> None:
        if self.seen[-1:] == [27]:
            raise RequestError("the grammar became too complex")
        bitmask_row[:] = len(self.seen)

    def accept(self, token: int) -> bool:
        self.seen.append(token)
        self.is_finished = token == 8
        return token != 44


class SlowGrammars:
    """Ready at the third look; the kind "grammar" never compiles."""

    def __init__(self) -> None:
        self.looks: dict[int, int] = {}

    def submit(self, request_id: int, spec: StructuredSpec) -> None:
        self.looks[request_id] = 0

    def ready(self, request_id: int) -> EvenThenOdd | None:
        self.looks[request_id] += 1
        return EvenThenOdd() if self.looks[request_id] > 2 else None

    def forget(self, request_id: int) -> None:
        del self.looks[request_id]


@AHEAD
def test_grammars_are_waited_for_and_asked_with_every_token_known(counting: Make, step_ahead: bool) -> None:
    grammars = SlowGrammars()
    engine = counting(4, step_ahead=step_ahead, parts={"grammars": grammars})
    spec = StructuredSpec("regex", "x")
    constrained = engine.submit([5], SamplingParams(max_tokens=9, structured=spec))
    free = engine.submit([60], SamplingParams(max_tokens=9))
    complex_ = engine.submit([25], SamplingParams(max_tokens=9, structured=spec))
    wrong = engine.submit([42], SamplingParams(max_tokens=9, structured=spec))
    done = finish(engine)
    assert (done[constrained].token_ids, done[constrained].finish_reason) == ([6, 7, 8], "stop")
    assert done[free].token_ids == expected([60], 9)
    assert (done[complex_].error, done[complex_].token_ids) == ("the grammar became too complex", [26, 27])
    assert "does not allow" in (done[wrong].error or "")
    assert grammars.looks == {}
    masks = [m[0, 0] for m in engine.runner.masks if m is not None]  # type: ignore[attr-defined]
    assert masks[:3] == [0, 1, 2], "each mask was made after the token before it"


# Speculation


class Guessing:
    """Guesses the next tokens right up to a multiple of five."""

    max_drafts = 3

    def __init__(self) -> None:
        self.forgotten: list[int] = []

    def propose(self, sequences: Any) -> list[list[int]]:
        found = []
        for sequence in sequences:
            guesses = [(sequence.all_ids[-1] + i) % 100 for i in range(1, 6)]
            found.append([0 if guess % 5 == 0 else guess for guess in guesses])
        return found

    def forget(self, request_id: int) -> None:
        self.forgotten.append(request_id)


def test_drafts_are_verified_and_change_nothing(counting: Make) -> None:
    drafter = Guessing()
    engine = counting(3, 128, parts={"drafter": drafter}, step_ahead=True)
    prompts = [[1], [20, 31], list(range(40, 77))]
    ids = [engine.submit(p, SamplingParams(max_tokens=30)) for p in prompts]
    stopped = engine.submit([1], SamplingParams(max_tokens=30, stop_token_ids=(9,)))
    penalised = engine.submit([1], SamplingParams(max_tokens=6, presence_penalty=1.0))
    done = finish(engine)
    assert [done[i].token_ids for i in ids] == [expected(p, 30) for p in prompts]
    assert done[stopped].token_ids == expected([1], 8)
    assert done[penalised].token_ids == expected([1], 6)
    stats = engine.stats()
    assert stats.accepted_tokens > 30 and stats.drafted_tokens > stats.accepted_tokens
    assert stats.steps < 40
    assert sorted(drafter.forgotten) == [*ids, stopped, penalised]


# Everything at once


@pytest.mark.parametrize("seed", range(12))
def test_random_traffic_leaks_no_page(counting: Make, seed: int) -> None:
    """Submissions, aborts and steps in random order under few pages: all answers are right, nothing is left."""
    choice = random.Random(seed)
    engine = counting(
        choice.randint(1, 6),
        64,
        num_pages=choice.randint(4, 14),
        step_ahead=seed % 2 == 1,
        max_num_batched_tokens=choice.choice([8, 20, 64]),
        enable_prefix_cache=seed % 3 != 2,
        parts={"drafter": Guessing()} if seed % 4 == 3 else None,
    )
    asked: dict[int, tuple[list[int], int]] = {}
    done: dict[int, Completion] = {}
    while len(asked) < 25 or engine.has_work:
        kind = choice.random()
        if kind < 0.3 and len(asked) < 25:
            prompt = [*range(choice.choice([0, 20, 33]))] + [
                choice.randrange(100) for _ in range(choice.randint(1, 15))
            ]
            num = choice.randint(1, 64 - len(prompt))
            request = engine.submit(prompt, SamplingParams(max_tokens=num), priority=choice.randrange(3))
            asked[request] = prompt, num
        elif kind < 0.37 and asked:
            request = choice.choice(sorted(asked))
            said = engine.abort(request)
            if said is not None:
                assert said.token_ids == expected(asked[request][0], len(said.token_ids))
            if request not in done:
                del asked[request]
                asked[-len(asked) - 1000 * seed - engine.num_requests] = ([0], 0)
        else:
            done.update({o.request_id: o.completion for o in engine.step() if o.completion})
            engine.scheduler.check()
    assert {i: c.token_ids for i, c in done.items()} == {i: expected(*a) for i, a in asked.items() if i > 0}
    assert engine.runner.pages.num_used == 0
    assert sorted(engine.scheduler.free_slots) == list(range(engine.config.max_num_seqs))
