"""What the client measures, beside a server whose delays are known."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tunesmith.bench.serve.client import Ask
from tunesmith.bench.serve.load import Share, run_load
from tunesmith.bench.serve.measures import summarise
from tunesmith.bench.serve.record import Record
from tunesmith.bench.serve.shards import divide, run_shares
from tunesmith.bench.serve.workload import Item


def _send(
    server: Any,
    items: list[Item],
    times: list[float] | None,
    concurrency: int = 1,
    began_s: float | None = None,
    **ask: Any,
) -> list[Record]:
    share = Share(tuple(items), tuple(range(len(items))), None if times is None else tuple(times), concurrency)
    return run_load(Ask(server.url, "known", **ask), share, began_s or time.monotonic()).records


def _near_what_was_said(server: Any, item: Item) -> Record:
    """One request whose chunks were noted within 20 ms of when the server wrote them, and never before.

    A busy machine wakes late, never early, so it has some tries.
    """
    for _ in range(20):
        server.said_s.clear()
        began_s = time.monotonic()
        (record,) = _send(server, [item], [0.0], began_s=began_s)
        late_s = [began_s + noted - said for noted, said in zip(record.contents_s, server.said_s, strict=True)]
        assert min(late_s) >= 0
        if max(late_s) < 0.02:
            break
    assert max(late_s) < 0.02
    own_s = (server.said_s[-1] - server.said_s[0]) / (item.max_tokens - 1)
    assert record.tpot_s == pytest.approx(own_s, abs=0.02)
    return record


def test_times_are_those_of_the_server(known_server: Any) -> None:
    known_server.first_s, known_server.gap_s = 0.08, 0.02
    record = _near_what_was_said(known_server, Item((1, 2, 3), 5))
    assert record.is_ok and record.status == 200 and record.finish_reason == "length"
    assert (record.prompt_tokens, record.output_tokens, record.is_counted) == (7, 5, True)
    assert len(record.contents_s) == 5
    assert record.ttft_s is not None and record.ttft_s >= 0.08
    assert len(record.itl_s) == 4 and sum(record.itl_s) == pytest.approx(record.contents_s[-1] - record.contents_s[0])
    assert record.e2e_s >= 0.08 + 4 * 0.02
    assert known_server.bodies[0]["prompt"] == [1, 2, 3]
    assert known_server.bodies[0]["ignore_eos"] is True


def test_the_role_of_a_chat_is_no_content(known_server: Any) -> None:
    known_server.first_s = 0.1
    (record,) = _send(known_server, [Item("how many eggs?", 3)], [0.0], ignore_eos=False, temperature=None)
    assert record.ttft_s is not None and record.ttft_s >= 0.1
    body = known_server.bodies[0]
    assert body["messages"] == [{"role": "user", "content": "how many eggs?"}]
    assert not {"ignore_eos", "temperature"} & body.keys()


def test_an_open_loop_counts_from_when_requests_were_due(known_server: Any) -> None:
    """A server that answers one request at a time: those behind waited, though it took each in no time (coordinated
    omission would show every request alike)."""
    known_server.first_s, known_server.at_once = 0.1, 1
    records = _send(known_server, [Item((1,), 1)] * 4, [0.0, 0.0, 0.0, 0.0])
    waits = sorted(record.ttft_s or 0.0 for record in records)
    assert waits[0] >= 0.1 and waits[3] >= 0.4
    # All were on their way before the first was answered: nobody waited for an answer to send the next.
    assert max(record.sent_s for record in records) < min(record.ended_s for record in records)


def test_a_closed_loop_has_so_many_in_flight(known_server: Any) -> None:
    known_server.first_s = 0.05
    records = _send(known_server, [Item((1,), 1)] * 6, None, concurrency=2)
    measures = summarise(records)
    assert measures["max_in_flight"] == 2
    assert measures["duration_s"] >= 0.15
    assert all(record.intended_s == record.sent_s for record in records)


def test_a_chunk_may_hold_several_tokens(known_server: Any) -> None:
    known_server.tokens_per_chunk, known_server.gap_s = 2, 0.02
    record = _near_what_was_said(known_server, Item((1,), 8))
    assert record.output_tokens == 8 and len(record.contents_s) == 4
    assert summarise([record])["tokens_per_chunk"] == 2


def test_without_usage_chunks_are_counted_and_said_to_be(known_server: Any) -> None:
    known_server.says_usage = False
    records = _send(known_server, [Item((1,), 3)], [0.0])
    assert (records[0].output_tokens, records[0].is_counted) == (3, False)
    assert summarise(records)["tokens_counted_by"] == "content chunks"


def test_refused_requests_are_errors_and_are_kept(known_server: Any) -> None:
    known_server.fail = 429
    records = _send(known_server, [Item((1,), 3)] * 3, [0.0] * 3)
    measures = summarise(records)
    assert measures["completed"] == 0 and measures["statuses"] == {"429": 3}
    assert "too many requests" in next(iter(measures["errors"]))
    assert measures["ttft_s"]["p50"] is None


def test_an_error_inside_a_stream_is_an_error(known_server: Any) -> None:
    known_server.fail_inside = True
    (record,) = _send(known_server, [Item((1,), 3)], [0.0])
    assert record.error is not None and "the engine died" in record.error


def test_a_request_that_does_not_end_is_stopped(known_server: Any) -> None:
    known_server.first_s = 3.0
    (record,) = _send(known_server, [Item((1,), 3)], [0.0], timeout_s=0.1)
    assert record.error == "no end within 0.1 s"


def test_a_server_that_is_not_there(known_server: Any) -> None:
    share = Share((Item((1,), 3),), (0,), (0.0,))
    (record,) = run_load(Ask("http://127.0.0.1:9", "none"), share, time.monotonic()).records
    assert record.error is not None and record.status is None


def test_the_key_goes_along(known_server: Any) -> None:
    _send(known_server, [Item((1,), 1)], [0.0], api_key="secret")
    assert known_server.keys == ["bearer secret"]


def test_shares_have_every_request_once() -> None:
    items = [Item((i,), 1) for i in range(10)]
    shares = divide(items, [float(i) for i in range(10)], 0, 3)
    assert sorted(i for share in shares for i in share.indices) == list(range(10))
    assert all(share.times_s == tuple(float(i) for i in share.indices) for share in shares)
    closed = divide(items, None, 5, 3)
    assert sorted(share.concurrency for share in closed) == [1, 2, 2]
    assert len(divide(items, None, 2, 8)) == 2


@pytest.mark.timeout(60)
def test_processes_share_a_load(known_server: Any) -> None:
    known_server.first_s = 0.01
    items = [Item((i,), 2) for i in range(6)]
    records, load = run_shares(Ask(known_server.url, "known"), divide(items, [0.0] * 6, 6, 2))
    assert [record.index for record in records] == list(range(6))
    assert all(record.is_ok for record in records)
    assert load.processes == 2 and load.cpu_ratio > 0
