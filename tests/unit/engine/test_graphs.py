"""Recorded decoding on a CPU: a recorder that repeats the work in place of CUDA graphs (tests/gpu has the real one)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.checkpoint.load import load_decoder
from tunesmith.engine.batch import SampledRow, StepBatch
from tunesmith.engine.config import EngineConfig
from tunesmith.engine.engine import Engine
from tunesmith.engine.graph_memory import measured_bytes
from tunesmith.engine.graphs import RECORD_AFTER, SPARE_BYTES, DecodeGraphs, Kind, coarse, ladder
from tunesmith.engine.pages import PAGE_SLOTS
from tunesmith.engine.request import SamplingParams
from tunesmith.engine.runner import NativeRunner
from tunesmith.engine.sampling import Sampling

CPU = torch.device("cpu")
VOCAB = 32


class Repeating:
    """What is recorded is done again by every replay, into the tensors that it gave when it was recorded."""

    def __init__(self, fails_at: int = -1) -> None:
        self.fails_at = fails_at
        self.num_warm_ups = self.num_recorded = self.num_renewed = 0

    def warm_up(self, work: Callable[[], object]) -> None:
        self.num_warm_ups += 1
        work()

    def record(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        assert self.num_warm_ups > self.num_recorded
        if self.num_recorded == self.fails_at:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        self.num_recorded += 1
        made = work()

        def replay() -> None:
            for into, tensor in zip(made, work(), strict=True):
                into.copy_(tensor)

        return replay, made

    def borrow(self, tensor: Tensor) -> Tensor:
        return tensor

    def free_bytes(self) -> int | None:
        return None

    def renew(self) -> None:
        self.num_renewed += 1


def toy(batch: StepBatch) -> Tensor:
    """Logits of the token after each row's own, shifted by its position and its adapter."""
    adapters = batch.tokens_T * 0 if batch.adapter_T is None else batch.adapter_T.long() + 1
    wanted = (batch.tokens_T + batch.positions_T + adapters) % VOCAB
    return torch.nn.functional.one_hot(wanted, VOCAB).float()


def make(recorder: Repeating, max_num_seqs: int = 20, max_context: int = 64, **options: Any) -> DecodeGraphs:
    sampling = Sampling(max_num_seqs, VOCAB, CPU)
    return DecodeGraphs(
        toy,
        sampling,
        max_num_seqs=max_num_seqs,
        max_context=max_context,
        slots_of_page=PAGE_SLOTS,
        device=CPU,
        recorder=recorder,
        **options,
    )


def decode(num: int, tokens: Sequence[int] = (), context: int = 5, adapter: int | None = None) -> StepBatch:
    ids = torch.arange(num)
    return StepBatch(
        tokens_T=torch.tensor(tokens) if tokens else ids,
        positions_T=ids * 0 + context - 1,
        slots_T=ids,
        query_starts_R1=torch.arange(num + 1, dtype=torch.int32),
        context_R=(ids * 0 + context).int(),
        block_tables_RP=torch.zeros(num, 2, dtype=torch.int32),
        max_query=1,
        max_context=context,
        sample_rows_B=ids,
        sample_slots_B=ids,
        sample_positions_B=ids * 0 + context,
        sequence_slots=list(range(num)),
        is_decode=True,
        adapter_T=None if adapter is None else (ids * 0 + adapter).int(),
    )


def test_ladder() -> None:
    assert ladder(1) == [1]
    assert ladder(20) == [1, 2, 4, 8, 16, 20]
    assert ladder(256)[:7] == [1, 2, 4, 8, 16, 24, 32]
    assert ladder(256)[-1] == 256
    assert ladder(4000)[-1] == 512
    assert coarse(ladder(100)) == [1, 2, 4, 8, 16, 32, 64, 100]


def test_sizes_are_recorded_from_the_largest_coarse_ones_first() -> None:
    recorder, told = Repeating(), []  # type: ignore[var-annotated]
    graphs = make(recorder, max_num_seqs=100, report=lambda done, wanted: told.append((done, wanted)))
    graphs.record(limit_s=0)
    assert list(graphs._graphs[graphs.first_kind]) == [100, 64, 32, 16, 8, 4, 2, 1]
    assert told[-1] == (8, len(ladder(100)))
    assert graphs.record_next()
    assert list(graphs._graphs[graphs.first_kind])[-1] == 96
    while graphs.record_next():
        pass
    assert sorted(graphs._graphs[graphs.first_kind]) == ladder(100)
    assert graphs.stats.num_graphs == recorder.num_recorded == recorder.num_warm_ups == len(ladder(100))
    graphs.drop()
    assert (graphs(decode(1)), recorder.num_renewed) == (None, 1)


def test_a_step_takes_the_least_size_that_holds_it_and_the_rest_is_padding() -> None:
    graphs = make(Repeating())
    graphs.record(limit_s=0)
    for num, size in ((1, 1), (3, 4), (8, 8), (9, 16), (20, 20)):
        before = graphs.stats.num_padding_rows
        decoded = graphs(decode(num))
        assert decoded is not None
        assert decoded.tokens_B.tolist() == [(i + 4) % VOCAB for i in range(num)]
        assert torch.equal(decoded.logits_BV, toy(decode(num)))
        assert graphs.stats.num_padding_rows - before == size - num
        assert graphs.sampling.state.last_tokens_N[:num].tolist() == decoded.tokens_B.tolist()
    assert graphs.stats.num_replays == 5


def test_rows_of_padding_leave_no_trace_of_an_earlier_step() -> None:
    graphs = make(Repeating(), sizes=[8])
    graphs.record()
    graphs(decode(8, context=30))
    graphs(decode(2, context=7))
    inputs = graphs._inputs
    assert inputs.slots.tolist() == [0, 1] + [-1] * 6
    assert inputs.contexts.tolist() == [7, 7] + [1] * 6
    assert inputs.sample_slots.tolist() == [0, 1] + [20] * 6
    assert inputs.tables[2:, 0].tolist() == [0] * 6


def test_tokens_that_only_the_device_knows_are_put_in_place() -> None:
    graphs = make(Repeating())
    graphs.record(limit_s=0)
    assert graphs(decode(3)) is not None
    decoded = graphs(decode(3, tokens=[-3, 9, -1], context=6))
    assert decoded is not None
    assert decoded.tokens_B.tolist() == [6 + 5, 9 + 5, 4 + 5]


def test_prefills_and_larger_batches_are_no_graphs() -> None:
    graphs = make(Repeating(), sizes=[1, 4])
    assert graphs(decode(2)) is None, "nothing is recorded yet"
    graphs.record()
    assert graphs(replace(decode(2), is_decode=False)) is None
    assert graphs(decode(5)) is None
    assert graphs(decode(2, context=64)) is not None
    assert graphs(decode(2, context=65)) is None
    assert graphs.stats.num_eager == 3


def test_longer_contexts_and_adapters_are_recorded_once_they_are_used() -> None:
    recorder = Repeating()
    graphs = make(recorder, sizes=[1, 2, 3, 4], max_context=20_000)
    assert graphs.contexts == [2048, 8192, 20_000]
    graphs.record()
    assert recorder.num_recorded == 4
    for context, adapter in ((9000, None), (50, 2), (9000, 0)):
        for _ in range(RECORD_AFTER):
            assert graphs(decode(3, context=context, adapter=adapter)) is None
        decoded = graphs(decode(3, context=context, adapter=adapter))
        assert decoded is not None
        assert torch.equal(decoded.logits_BV, toy(decode(3, context=context, adapter=adapter)))
    assert recorder.num_recorded == 4 + 3, "of the size that is used"
    for _ in range(RECORD_AFTER):
        assert graphs(decode(1, context=9000)) is not None, "in a graph of four rows"
    assert graphs.stats.num_padding_rows == 3 * (1 + RECORD_AFTER)
    assert graphs(decode(1, context=9000)) is not None
    assert recorder.num_recorded == 4 + 3 + 1
    decoded = graphs(decode(3, adapter=None))
    assert decoded is not None and torch.equal(decoded.logits_BV, toy(decode(3)))
    assert set(graphs._graphs) == {Kind(2048), Kind(20_000), Kind(2048, True), Kind(20_000, True)}
    while graphs.record_next():
        pass
    assert recorder.num_recorded == 4 * 4


def test_what_cannot_be_recorded_runs_launch_by_launch(caplog: pytest.LogCaptureFixture) -> None:
    graphs = make(Repeating(fails_at=0))
    with caplog.at_level(logging.WARNING):
        graphs.record()
    assert "launch by launch: operation not permitted when stream is capturing" in caplog.text
    assert graphs(decode(1)) is None
    assert not graphs.record_next()
    assert graphs.refused == {graphs.first_kind: "operation not permitted when stream is capturing"}


def test_a_later_failure_keeps_what_is_there() -> None:
    graphs = make(Repeating(fails_at=2), sizes=[1, 2, 4])
    graphs.record()
    assert graphs.stats.num_graphs == 2
    assert graphs(decode(1)) is not None
    assert graphs(decode(3)) is not None


class Shrinking(Repeating):
    """A device whose memory every recording takes some of."""

    def __init__(self, taken: Sequence[int], **options: Any) -> None:
        super().__init__(**options)
        self.taken = taken

    def free_bytes(self) -> int:
        return 4 * SPARE_BYTES - sum(self.taken[: self.num_recorded])


def test_recording_stops_where_memory_is_short_and_counts_what_it_took() -> None:
    graphs = make(Shrinking([1000, 500 + 3 * SPARE_BYTES]), sizes=[1, 2, 4])
    graphs.record()
    assert graphs.stats.num_graphs == 2
    assert graphs.stats.num_bytes == 1500 + 3 * SPARE_BYTES
    assert "memory" in graphs.refused[graphs.first_kind]
    assert graphs(decode(1)) is not None, "in a graph of two rows"


def test_what_all_graphs_will_take_is_measured_on_two_and_nothing_stays() -> None:
    recorder = Shrinking([5000, 70])
    graphs = make(recorder, sizes=[1, 2, 3, 4, 8])
    assert measured_bytes(graphs) == 5000 + 4 * 70
    assert not graphs._graphs and (recorder.num_recorded, recorder.num_renewed) == (2, 1)
    assert measured_bytes(make(Shrinking([5000]), sizes=[8])) == 5000
    assert measured_bytes(make(Shrinking([5000], fails_at=0))) == 0


# With a real decoder


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue("tiny_model_dir")("qwen2", initializer_range=0.2)  # type: ignore[no-any-return]


def _engine(directory: Path, with_graphs: bool, **options: Any) -> Engine:
    config = EngineConfig(max_model_len=64, max_num_seqs=6, max_num_batched_tokens=64, debug_pages=True, **options)
    runner = NativeRunner(load_decoder(directory), config, num_pages=24)
    runner._fused = None  # a CPU's own pass keeps things on the host, which nothing could record
    if with_graphs:
        runner.graphs = DecodeGraphs(
            runner._decode,
            runner.sampling,
            max_num_seqs=6,
            max_context=64,
            slots_of_page=PAGE_SLOTS,
            device=CPU,
            recorder=Repeating(),
            sizes=[1, 2, 4, 6],
        )
        runner.warm_up()
    return Engine(runner, config=config)


REQUESTS: list[dict[str, Any]] = [
    {"max_tokens": 12},
    {"max_tokens": 9, "temperature": 0.8, "seed": 3},
    {"max_tokens": 14, "temperature": 1.0, "top_k": 5, "seed": 4, "logprobs": 2},
    {"max_tokens": 5, "temperature": 1.0, "presence_penalty": 1.0, "seed": 5},
    {"max_tokens": 1},
    {"max_tokens": 20, "temperature": 0.7, "seed": 6},
    {"max_tokens": 10, "temperature": 0.9, "seed": 7},
]


def _answers(engine: Engine) -> list[list[int]]:
    """Prompts of one token too: their first step looks like decoding."""
    prompts = [list(range(3 + i, 3 + i + (1 if i % 3 == 0 else 5 * i))) for i in range(len(REQUESTS))]
    ids = [engine.submit(p, SamplingParams(**o)) for p, o in zip(prompts, REQUESTS, strict=True)]
    done = {}
    while engine.has_work:
        done.update({o.request_id: o.completion for o in engine.step() if o.completion})
    return [done[i].token_ids for i in ids]  # type: ignore[union-attr]


@pytest.mark.parametrize("step_ahead", [False, True])
def test_the_engine_says_the_same_with_graphs(directory: Path, step_ahead: bool) -> None:
    plain = _answers(_engine(directory, with_graphs=False))
    engine = _engine(directory, with_graphs=True, step_ahead=step_ahead)
    assert _answers(engine) == plain
    graphs = engine.runner.graphs  # type: ignore[attr-defined]
    assert graphs.stats.num_replays > 10
    assert graphs.stats.num_eager == 0
    assert graphs.stats.num_padding_rows > 0


class _SlowPending:
    """A step that is there at a time."""

    def __init__(self, pending: Any, done_s: float, log: list[str]) -> None:
        self.pending, self.done_s, self.log = pending, done_s, log

    def wait(self) -> Any:
        time.sleep(max(0.0, self.done_s - time.perf_counter()))
        self.log.append("read")
        return self.pending.wait()


class _Slow:
    """A runner whose device takes `device_s` for a step while the host goes on; it logs launches and reads."""

    def __init__(self, inner: Any, device_s: float) -> None:
        self.inner, self.device_s = inner, device_s
        self.free_at_s = 0.0
        self.log: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def forward(self, batch: StepBatch) -> None:
        self.free_at_s = max(time.perf_counter(), self.free_at_s) + self.device_s
        self.log.append("launch")
        self.inner.forward(batch)

    def sample(self, batch: StepBatch, rows: Sequence[SampledRow], masks: Any) -> Any:
        return _SlowPending(self.inner.sample(batch, rows, masks), self.free_at_s, self.log)


@pytest.mark.parametrize("step_ahead", [False, True])
def test_the_next_step_is_launched_before_the_last_is_read(counting: Callable[..., Engine], step_ahead: bool) -> None:
    engine = counting(3, step_ahead=step_ahead)
    slow = _Slow(engine.runner, device_s=0.004)
    engine.runner = slow  # type: ignore[assignment]
    for i in range(3):
        engine.submit([10 * i], SamplingParams(max_tokens=20))
    while engine.has_work:
        engine.step()
    assert slow.log.count("launch") == slow.log.count("read") == 20
    pairs = ["read", "launch"] * 19
    assert slow.log == (["launch", *reversed(pairs), "read"] if step_ahead else ["launch", *pairs, "read"])
