"""Percentiles, goodput, and whether the client was the limit."""

from __future__ import annotations

import pytest

from tunesmith.bench.serve.measures import ClientLoad, Objective, meets, parse_slo, percentile, spread, summarise
from tunesmith.bench.serve.record import Record
from tunesmith.errors import RecipeError


def _record(
    index: int = 0, *, due: float = 0.0, contents: list[float], tokens: int, error: str | None = None
) -> Record:
    ended = contents[-1] if contents else due + 1
    return Record(index, due, due, contents, ended, 10, tokens, status=200, error=error)


def test_a_percentile_is_a_value_that_was_there() -> None:
    values = [float(v) for v in range(1, 101)]
    assert [percentile(values, p) for p in (50, 90, 95, 99)] == [50.0, 90.0, 95.0, 99.0]
    assert percentile([3.0, 1.0, 2.0], 99) == 3.0
    assert percentile([5.0], 50) == 5.0
    assert percentile([], 50) is None
    assert spread([])["mean"] is None


def test_objectives_are_read() -> None:
    assert parse_slo("ttft:200ms, tpot:50ms,e2e:1.5s") == (
        Objective("ttft", 0.2),
        Objective("tpot", 0.05),
        Objective("e2e", 1.5),
    )
    assert parse_slo("") == ()


@pytest.mark.parametrize("text", ["ttf:200ms", "ttft", "ttft:fast", "ttft:200", "ttft:-1ms", "ttft:nanms"])
def test_bad_objectives_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="slo"):
        parse_slo(text)


def test_good_is_every_objective_and_no_error() -> None:
    slo = parse_slo("ttft:200ms,tpot:50ms")
    good = _record(contents=[0.1, 0.14, 0.18], tokens=3)
    assert meets(good, slo)
    assert not meets(_record(contents=[0.3, 0.34], tokens=2), slo)
    assert not meets(_record(contents=[0.1, 0.3], tokens=2), slo)
    assert meets(_record(contents=[0.1], tokens=1), slo)
    assert not meets(_record(contents=[0.1], tokens=1, error="cut"), slo)


def test_a_request_that_waited_to_be_sent_took_longer() -> None:
    record = Record(0, 1.0, 1.5, [1.6, 1.7], 1.7, 10, 2)
    assert record.ttft_s == pytest.approx(0.6)
    assert record.e2e_s == pytest.approx(0.7)
    assert record.tpot_s == pytest.approx(0.1)


def test_an_answer_that_was_read_at_once_has_no_time_per_token() -> None:
    """A median of 0 ms was shown."""
    whole, streamed = _record(contents=[0.1, 0.1, 0.1], tokens=3), _record(contents=[0.1, 0.3], tokens=3)
    assert whole.tpot_s is None and whole.is_whole and not streamed.is_whole
    found = summarise([whole, streamed, _record(contents=[0.1], tokens=1)])
    assert found["answers_whole"] == 1 and found["tpot_s"]["count"] == 1
    assert found["tpot_s"]["p50"] == pytest.approx(0.1)


def test_a_point_in_numbers() -> None:
    records = [
        _record(0, contents=[0.5, 1.0], tokens=2),
        _record(1, due=1.0, contents=[1.5, 2.0], tokens=2),
        _record(2, due=1.0, contents=[], tokens=0, error="status 500"),
    ]
    found = summarise(records, parse_slo("ttft:600ms"))
    assert (found["requests"], found["completed"], found["errors"]) == (3, 2, {"status 500": 1})
    assert found["duration_s"] == 2.0
    assert found["output_tokens_per_s"] == 2.0 and found["total_tokens_per_s"] == 12.0
    assert found["ttft_s"]["p50"] == pytest.approx(0.5)
    assert found["goodput"]["requests_per_s"] == 1.0
    assert found["goodput"]["good_ratio"] == pytest.approx(2 / 3)
    assert summarise(records)["goodput"]["good_ratio"] is None
    assert summarise([])["requests_per_s"] is None


def test_a_client_that_was_the_limit_is_named() -> None:
    assert ClientLoad(0.3, 0.001, 0.0).saturated is None
    assert "client-processes" in (ClientLoad(0.95, 0.001, 0.0).saturated or "")
    assert "late" in (ClientLoad(0.3, 0.05, 0.0).saturated or "")
