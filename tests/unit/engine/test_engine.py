"""The engine's loop against a fake model whose next token is the last one plus one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tunesmith.engine.engine import Engine
from tunesmith.engine.request import Completion, SamplingParams
from tunesmith.errors import RequestError

VOCAB = 100
CONTEXT = 32


class FakeLease:
    def __init__(self, runner: Counting) -> None:
        self.runner = runner
        runner.open_leases += 1
        self.closed = False

    def close(self) -> None:
        self.runner.open_leases -= not self.closed
        self.closed = True


class Counting:
    """A runner that says last token + 1, and has room for `places` requests."""

    max_model_len = CONTEXT

    def __init__(self, places: int = 1) -> None:
        self.places, self.open_leases, self.fail_at, self.num_steps = places, 0, -1, 0
        self.batch_sizes: list[int] = []

    def open(self, max_tokens: int) -> FakeLease | None:
        return FakeLease(self) if self.open_leases < self.places else None

    def step(self, work: Any) -> torch.Tensor:
        self.num_steps += 1
        self.batch_sizes.append(len(work))
        if self.num_steps == self.fail_at:
            raise KeyboardInterrupt
        logits = torch.zeros(len(work), VOCAB)
        for row, (_, pending) in enumerate(work):
            logits[row, (pending[-1] + 1) % VOCAB] = 1.0
        return logits


def finish(engine: Engine) -> dict[int, Completion]:
    done = {}
    while engine.has_work:
        done.update({o.request_id: o.completion for o in engine.step() if o.completion})
    return done


def test_a_request_ends_at_its_length_or_at_a_stop_token() -> None:
    engine = Engine(Counting(), stop_ids=[7])
    long = engine.submit([10], SamplingParams(max_tokens=4))
    stopped = engine.submit([5], SamplingParams(max_tokens=10))
    ignoring = engine.submit([5], SamplingParams(max_tokens=4, ignore_eos=True))
    done = finish(engine)
    assert (done[long].token_ids, done[long].finish_reason) == ([11, 12, 13, 14], "length")
    assert (done[stopped].token_ids, done[stopped].finish_reason) == ([6, 7], "stop")
    assert (done[ignoring].token_ids, done[ignoring].finish_reason) == ([6, 7, 8, 9], "length")
    assert engine.runner.open_leases == 0  # type: ignore[attr-defined]


def test_requests_are_served_in_order_one_at_a_time() -> None:
    engine = Engine(Counting())
    ids = [engine.submit([i], SamplingParams(max_tokens=2)) for i in range(3)]
    assert list(finish(engine)) == ids
    assert set(engine.runner.batch_sizes) == {1}  # type: ignore[attr-defined]


def test_several_run_together_when_there_is_room() -> None:
    runner = Counting(places=2)
    engine = Engine(runner, max_running=3)
    ids = [engine.submit([10 * i], SamplingParams(max_tokens=i + 2)) for i in range(3)]
    done = finish(engine)
    assert [done[i].token_ids[-1] for i in ids] == [2, 13, 24]
    assert runner.batch_sizes[0] == 2, "the third had to wait for a lease"


def test_max_tokens_default_fills_the_room() -> None:
    engine = Engine(Counting())
    request = engine.submit([0] * 30, SamplingParams())
    assert len(finish(engine)[request].token_ids) == CONTEXT - 30


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "message"),
    [
        (32, None, "no room for an answer"),
        (40, 1, "no room for an answer"),
        (30, 3, "max_tokens of at most 2"),
        (0, 1, "no token"),
    ],
)
def test_overflow_is_refused_with_the_numbers(num_prompt: int, max_tokens: int | None, message: str) -> None:
    engine = Engine(Counting())
    with pytest.raises(RequestError, match=message):
        engine.submit([1] * num_prompt, SamplingParams(max_tokens=max_tokens))
    assert not engine.has_work


def test_abort_frees_the_lease_wherever_the_request_is() -> None:
    engine = Engine(Counting())
    running = engine.submit([1], SamplingParams(max_tokens=9))
    waiting = engine.submit([2], SamplingParams(max_tokens=9))
    engine.step()
    engine.step()
    assert engine.abort(waiting) is None
    said = engine.abort(running)
    assert said is not None
    assert (said.token_ids, said.finish_reason) == ([2, 3], "abort")
    assert engine.abort(running) is None
    assert not engine.has_work
    assert engine.runner.open_leases == 0  # type: ignore[attr-defined]


def test_an_interrupted_step_drops_what_ran_and_leaves_the_engine_usable() -> None:
    runner = Counting()
    engine = Engine(runner)
    first = engine.submit([1], SamplingParams(max_tokens=9))
    runner.fail_at = 2
    engine.step()
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert runner.open_leases == 0
    with pytest.raises(RequestError, match="send it again"):
        engine.collect([first])
    again = engine.submit([1], SamplingParams(max_tokens=1))
    assert finish(engine)[again].token_ids == [2]


def test_outputs_of_others_are_kept_for_them() -> None:
    engine = Engine(Counting(places=2), max_running=2)
    one = engine.submit([1], SamplingParams(max_tokens=3))
    two = engine.submit([50], SamplingParams(max_tokens=3))
    mine = [o.token_id for _ in range(3) for o in engine.collect([one])]
    assert mine == [2, 3, 4]
    assert [o.token_id for o in engine.collect([two])] == [51, 52, 53]


def test_timings_add_up() -> None:
    engine = Engine(Counting())
    engine.submit([1], SamplingParams(max_tokens=1))
    request = engine.submit([1], SamplingParams(max_tokens=5))
    timings = finish(engine)[request].timings
    assert 0 < timings.queued_s <= timings.ttft_s <= timings.total_s
    assert timings.tpot_s == pytest.approx((timings.total_s - timings.ttft_s) / 4, rel=0.5, abs=1e-3)


def test_stop_texts_need_a_tokenizer() -> None:
    with pytest.raises(RequestError, match="tokenizer"):
        Engine(Counting()).submit([1], SamplingParams(stop=("x",)))
