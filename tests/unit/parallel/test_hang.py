"""Who hangs, and who is only slow: the judge, with a clock of the test's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tunesmith.parallel.hang import PATIENCE, SILENT_PATIENCE, Judge, Verdict
from tunesmith.parallel.progress import Report

LIMIT = 10.0


def report(beat: int = 1, calls: int = 0, **changed: Any) -> Report:
    """A report of a rank that has taken a step and entered `calls` collectives."""
    base = Report(beat=beat, moved=1, step=1, collectives={"world": calls}, at="step 2", patient=False, waits=False)
    return replace(base, **changed)


def first_verdict(judge: Judge, seconds: float, reports: Any, start: float = 0.0) -> tuple[float, Verdict] | None:
    """Look every half second at `reports(now)`; when somebody is named, and whom."""
    now = start
    while now <= start + seconds:
        found = judge.look(reports(now), now)
        if found is not None:
            return now, found
        now += 0.5
    return None


def test_who_does_not_enter_a_collective_is_named_within_the_limit() -> None:
    def reports(now: float) -> dict[int, Report]:
        beat = int(2 * now)
        return {0: report(beat, 5), 1: report(beat, 4), 2: report(beat, 5)}

    found = first_verdict(Judge(LIMIT), 60, reports)
    assert found is not None
    when, verdict = found
    assert LIMIT / 2 < when <= LIMIT
    assert (verdict.ranks, verdict.waiting, verdict.silent) == ((1,), (0, 2), ())
    assert "rank 1 hangs in step 2" in verdict.line({1: "data.py:3 in read"})
    assert "rank 1 is at data.py:3 in read" in verdict.line({1: "data.py:3 in read"})


def test_a_stopped_process_is_said_not_to_answer() -> None:
    found = first_verdict(Judge(LIMIT), 60, lambda now: {0: report(int(2 * now), 5), 1: report(1, 4)})
    assert found is not None
    assert (found[1].ranks, found[1].silent) == ((1,), (1,))
    assert "does not answer" in found[1].line({})


def test_all_slow_alike_is_no_hang() -> None:
    """A step of ten minutes, all ranks in it: nobody waits for anybody."""
    assert first_verdict(Judge(LIMIT), 600, lambda now: {r: report(int(2 * now), 5) for r in range(3)}) is None


def test_slow_but_moving_is_no_hang() -> None:
    """Others wait for rank 1 all the time, and it does a micro-batch every nine seconds."""

    def reports(now: float) -> dict[int, Report]:
        beat = int(2 * now)
        return {0: report(beat, 5), 1: report(beat, 4, moved=int(now / 7))}

    assert first_verdict(Judge(LIMIT), 300, reports) is None


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_what_is_declared_to_be_long_has_patience(factor: float) -> None:
    """A save on rank 1 alone, the others at a barrier."""

    def reports(now: float) -> dict[int, Report]:
        beat = int(2 * now)
        return {0: report(beat, 5), 1: report(beat, 4, patient=True, at="saving")}

    found = first_verdict(Judge(LIMIT), factor * LIMIT * PATIENCE * 0.8, reports)
    assert (found is None) == (factor < 1)


def test_a_stopped_process_has_less_patience() -> None:
    """Steps are quick, and its last report was of the first one."""
    found = first_verdict(Judge(LIMIT), 300, lambda now: {0: report(int(2 * now), 5), 1: report(1, 4, patient=True)})
    assert found is not None
    assert found[1].silent == (1,)
    assert found[0] <= SILENT_PATIENCE * LIMIT


def test_late_by_less_than_a_step_is_no_hang() -> None:
    """Steps take a minute; rank 1 is half a minute late. A limit that was asked for is exact."""

    def reports(now: float) -> dict[int, Report]:
        step, into = divmod(now, 60.0)
        late = int(step) if into < 40 else int(step) + 1  # rank 1 enters the step's collective 40 s into it
        beat = int(2 * now)
        return {0: report(beat, int(step) + 1, step=int(step)), 1: report(beat, late, step=int(step), moved=late)}

    def from_second_step(now: float) -> dict[int, Report]:
        made = reports(now)
        return {rank: replace(one, patient=now < 60) for rank, one in made.items()}

    assert first_verdict(Judge(LIMIT), 600, from_second_step) is None
    assert first_verdict(Judge(LIMIT, is_exact=True), 600, from_second_step) is not None


def test_of_a_chain_the_last_is_named() -> None:
    """Rank 0 waits for rank 1 in group a, rank 1 for rank 2 in group b."""

    def reports(now: float) -> dict[int, Report]:
        beat = int(2 * now)
        return {
            0: report(beat, collectives={"a": 5}),
            1: report(beat, collectives={"a": 4, "b": 7}),
            2: report(beat, collectives={"b": 6}),
        }

    found = first_verdict(Judge(LIMIT), 60, reports)
    assert found is not None and found[1].ranks == (2,)


def test_ranks_that_wait_for_each_other_are_all_named() -> None:
    def reports(now: float) -> dict[int, Report]:
        beat = int(2 * now)
        return {0: report(beat, collectives={"a": 5, "b": 6}), 1: report(beat, collectives={"a": 4, "b": 7})}

    found = first_verdict(Judge(LIMIT), 60, reports)
    assert found is not None
    assert found[1].ranks == (0, 1)
    assert found[0] > LIMIT


def test_in_a_pipeline_who_stands_in_its_own_code_is_named() -> None:
    """Sends and receives are not counted; rank 1 stands in torch.distributed, rank 0 elsewhere."""

    def reports(now: float) -> dict[int, Report]:
        beat = int(2 * now)
        return {0: report(beat, collectives={}), 1: report(beat, collectives={}, waits=True)}

    found = first_verdict(Judge(LIMIT), 60, reports)
    assert found is not None and (found[1].ranks, found[1].waiting) == ((0,), (1,))


def test_who_is_finished_is_left_alone() -> None:
    def reports(now: float) -> dict[int, Report]:
        return {0: report(int(2 * now), 6), 1: report(1, 5, finished=True)}

    assert first_verdict(Judge(LIMIT), 100, reports) is None


def test_a_verdict_is_sent_as_json() -> None:
    verdict = Verdict((1,), (), (0, 2), "step 3", 9.0)
    assert Verdict.from_data({**vars(verdict), "ranks": [1], "silent": [], "waiting": [0, 2]}) == verdict


def test_of_many_a_few_are_listed() -> None:
    line = Verdict((1,), (), tuple(range(2, 40)), "step 3", 9.0).line({})
    assert "2, 3, 4, 5, 6, 7, 8, 9 and 30 more wait" in line
