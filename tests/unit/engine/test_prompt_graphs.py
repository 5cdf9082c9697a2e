"""Recorded steps with prompts on a CPU: a recorder repeats the work in place of CUDA graphs (tests/gpu has those)."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.checkpoint.inference import load_for_inference
from tunesmith.checkpoint.load import load_decoder
from tunesmith.engine import attend, prompt_graphs
from tunesmith.engine.asked import Asked
from tunesmith.engine.attention_backends import AttentionKernels
from tunesmith.engine.attention_shapes import AttentionShape
from tunesmith.engine.batch import FreshTail, StepBatch
from tunesmith.engine.config import EngineConfig
from tunesmith.engine.engine import Engine
from tunesmith.engine.graph_memory import measured_bytes
from tunesmith.engine.graphs import RECORD_AFTER, SPARE_BYTES, DecodeGraphs
from tunesmith.engine.launches import launches_of
from tunesmith.engine.loading import make_config
from tunesmith.engine.pages import PAGE_SLOTS
from tunesmith.engine.prompt_graphs import IMPROVE_AFTER, PromptGraphs, Size, first_sizes, ladder
from tunesmith.engine.request import SamplingParams
from tunesmith.engine.runner import NativeRunner
from tunesmith.engine.sampling_state import SamplingState
from tunesmith.engine.speculate import NgramDrafter
from tunesmith.kernels.chip import Chip, foreseeing, stands_in
from tunesmith.kernels.nf4 import kernels_on

CPU = torch.device("cpu")
SIZES = [Size(8, 4), Size(32, 4), Size(32, 16), Size(64, 4), Size(64, 16)]


class Repeating:
    """What is recorded is done again by every replay, into the tensors that it gave when it was recorded."""

    def __init__(self, fails_at: int = -1, taken: Sequence[int] = ()) -> None:
        self.fails_at, self.taken = fails_at, taken
        self.num_recorded = 0

    def warm_up(self, work: Callable[[], object]) -> None:
        work()

    def record(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
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
        return 4 * SPARE_BYTES - sum(self.taken[: self.num_recorded]) if self.taken else None

    def renew(self) -> None:
        return


def toy(batch: StepBatch) -> Tensor:
    """Of each token: itself, its position, its request, that request's context and first page; -1 for padding."""
    starts, rows = batch.query_starts_R1.long(), torch.arange(batch.num_tokens)
    owner = torch.searchsorted(starts, rows, right=True) - 1
    is_own = rows < starts[-1]
    owner = torch.where(is_own, owner, 0)
    facts = [batch.tokens_T, batch.positions_T, owner, batch.context_R[owner], batch.block_tables_RP[owner, 0]]
    found = torch.stack(facts, dim=1).float()
    return torch.where(is_own[:, None], found, torch.nan)


def make(recorder: Repeating, max_context: int = 64, sizes: Sequence[Size] = SIZES) -> PromptGraphs:
    state = SamplingState(16, 9, CPU)
    return PromptGraphs(
        toy,
        state,
        sizes=sizes,
        max_context=max_context,
        slots_of_page=PAGE_SLOTS,
        device=CPU,
        recorder=recorder,  # type: ignore[arg-type]
    )


def step(counts: Sequence[int], context: int = 40, **changes: Any) -> StepBatch:
    total, num = sum(counts), len(counts)
    ids = torch.arange(total)
    batch = StepBatch(
        tokens_T=ids + 5,
        positions_T=ids + 1,
        slots_T=ids,
        query_starts_R1=torch.tensor([0, *counts]).cumsum(0).int(),
        context_R=torch.full((num,), context, dtype=torch.int32),
        block_tables_RP=torch.arange(3 * num, dtype=torch.int32).view(num, 3) + 1,
        max_query=max(counts),
        max_context=context,
        sample_rows_B=torch.tensor(counts).cumsum(0) - 1,
        sample_slots_B=torch.arange(num),
        sample_positions_B=torch.arange(num),
        sequence_slots=list(range(num)),
        is_decode=False,
    )
    return replace(batch, **changes)


def test_ladder(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ladder(64, 6) == [Size(8, 6), Size(16, 6), Size(32, 6), Size(64, 6)]
    sizes = ladder(8192, 256)
    assert sizes[0] == Size(8, 8) and sizes[-1] == Size(2048, 256)
    assert [size.num_requests for size in sizes if size.num_tokens == 128] == [8, 64, 128]
    assert first_sizes(sizes) == [Size(128, 8), Size(256, 8), Size(512, 8), Size(1024, 8)]
    assert first_sizes(ladder(100, 2)) == [Size(100, 2)]
    assert first_sizes(ladder(300, 1)) == [Size(128, 1), Size(256, 1), Size(300, 1)]
    assert ladder(1500, 1)[-1] == Size(1500, 1) not in first_sizes(ladder(1500, 1))
    monkeypatch.setattr(prompt_graphs, "MOST_TOKENS", 0)
    assert ladder(8192, 256) == []


def test_a_step_takes_the_least_size_that_holds_it_and_the_rest_is_padding() -> None:
    graphs = make(Repeating())
    graphs.record()
    for counts, size in (([3], 8), ([2, 2, 2, 2], 8), ([1] * 5, 32), ([30, 1, 1], 32), ([1] * 9 + [30], 64)):
        before = graphs.stats.num_padding_rows
        hidden = graphs(step(counts))
        assert hidden is not None
        assert torch.equal(hidden, toy(step(counts)))
        assert graphs.stats.num_padding_rows - before == size - sum(counts)
    assert graphs.stats.num_replays == 5
    assert graphs.stats.num_graphs == len(SIZES)


def test_tokens_that_only_the_device_knows_are_put_in_place() -> None:
    graphs = make(Repeating())
    graphs.record()
    graphs.state.last_tokens_N[3] = 77
    hidden = graphs(step([1, 4], tokens_T=torch.tensor([-4, 9, 8, 7, 6])))
    assert hidden is not None
    assert hidden[:, 0].tolist() == [77, 9, 8, 7, 6]


def test_the_first_sizes_are_recorded_at_start_up_and_the_others_in_idle_moments() -> None:
    recorder = Repeating()
    graphs = make(recorder, sizes=ladder(8192, 100))
    graphs.record(limit_s=0)
    made = graphs._graphs[64]
    assert list(made) == [Size(1024, 8), Size(512, 8), Size(256, 8), Size(128, 8)]
    for counts in ([5], [100], [300, 1, 1, 1], [1000]):
        hidden = graphs(step(counts))
        assert hidden is not None and torch.equal(hidden, toy(step(counts)))
    assert graphs.record_next()
    assert list(made)[-1] == Size(2048, 100)
    while graphs.record_next():
        pass
    assert sorted(made) == ladder(8192, 100)
    graphs.drop()
    assert graphs(step([5])) is None


def test_what_is_not_covered_runs_launch_by_launch() -> None:
    graphs = make(Repeating())
    assert graphs(step([5])) is None, "nothing is recorded yet"
    graphs.record()
    assert graphs(step([65])) is None
    assert graphs(step([1] * 17)) is None
    assert graphs(step([5], context=65)) is None
    assert graphs(step([5], adapter_T=torch.zeros(5, dtype=torch.int32))) is None
    assert graphs.stats.num_eager == 5 and graphs.stats.num_replays == 0


def test_sizes_and_longer_contexts_are_recorded_once_they_are_used() -> None:
    recorder = Repeating()
    graphs = make(recorder, max_context=20_000, sizes=[Size(8, 4), Size(128, 4), Size(128, 16)])
    assert graphs.contexts == [2048, 8192, 20_000]
    graphs.record(limit_s=0)
    assert recorder.num_recorded == 1
    for counts, context in (([20] * 5, 50), ([5], 9000)):
        for _ in range(RECORD_AFTER):
            assert graphs(step(counts, context)) is None
        hidden = graphs(step(counts, context))
        assert hidden is not None and torch.equal(hidden, toy(step(counts, context)))
    assert recorder.num_recorded == 3
    for _ in range(IMPROVE_AFTER):
        assert graphs(step([5])) is not None, "in a graph of more tokens"
    assert recorder.num_recorded == 3
    assert graphs(step([5])) is not None
    assert recorder.num_recorded == 4
    assert {context: sorted(made) for context, made in graphs._graphs.items()} == {
        2048: [Size(8, 4), Size(128, 4), Size(128, 16)],
        20_000: [Size(8, 4)],
    }


def test_padding_that_costs_more_than_launches_is_not_taken() -> None:
    graphs = make(Repeating(), sizes=[Size(32, 4), Size(64, 4)])
    graphs._record(64, Size(64, 4))
    graphs.host_s = 0.010
    graphs._graphs[64] = {size: replace(made, device_s=0.020) for size, made in graphs._graphs[64].items()}
    assert graphs(step([33])) is None
    assert graphs(step([64])) is not None, "nothing of it is padding"
    assert graphs(step([30])) is None, "the graph of 64 takes longer than launching"
    assert graphs._missing(64) == [Size(32, 4)], "half of 20 ms is not more than launches take"
    graphs.host_s = 0.009
    assert graphs._missing(64) == []
    for _ in range(2 * RECORD_AFTER):
        assert graphs(step([30])) is None
    assert graphs.stats.num_graphs == 1
    graphs.host_s = 0.021
    assert graphs(step([33])) is not None


def test_what_cannot_be_recorded_runs_launch_by_launch(caplog: pytest.LogCaptureFixture) -> None:
    graphs = make(Repeating(fails_at=0))
    with caplog.at_level(logging.WARNING):
        graphs.record()
    assert "launch by launch: operation not permitted when stream is capturing" in caplog.text
    for _ in range(2 * RECORD_AFTER):
        assert graphs(step([5])) is None
    assert not graphs.record_next()
    assert graphs.refused == {64: "operation not permitted when stream is capturing"}


def test_recording_stops_where_memory_is_short_and_counts_what_it_took() -> None:
    graphs = make(Repeating(taken=[1000, 500 + 3 * SPARE_BYTES]))
    graphs.record()
    assert graphs.stats.num_graphs == 2
    assert graphs.stats.num_bytes == 1500 + 3 * SPARE_BYTES
    assert "memory" in graphs.refused[64]
    assert graphs(step([40])) is not None


def test_what_all_graphs_will_take_is_measured_on_two_and_nothing_stays() -> None:
    decoding = DecodeGraphs(
        lambda batch: torch.zeros(batch.num_requests, 9),
        _sampling(),
        max_num_seqs=2,
        max_context=64,
        slots_of_page=PAGE_SLOTS,
        device=CPU,
        recorder=Repeating(),  # type: ignore[arg-type]
    )
    graphs = make(Repeating(taken=[5000, 70]))
    assert measured_bytes(decoding, graphs) == 5000 + 4 * 70
    assert not graphs._graphs
    assert graphs.recorder.num_recorded == 2  # type: ignore[attr-defined]
    decoding.recorder = Repeating(fails_at=0)  # type: ignore[assignment]
    assert measured_bytes(decoding, graphs) == 0
    assert graphs.recorder.num_recorded == 2  # type: ignore[attr-defined]


def _sampling() -> Any:
    from tunesmith.engine.sampling import Sampling

    return Sampling(2, 9, CPU)


# With a real decoder


@pytest.fixture(scope="module")
def directory(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    make_dir = request.getfixturevalue("tiny_model_dir")
    return lambda family: make_dir(family, initializer_range=0.2)  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def padding_is_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention gives no numbers for rows that belong to no request."""
    kernel = attend.paged_attention

    def worst(query: Tensor, *given: Any, **options: Any) -> Tensor:
        out = kernel(query, *given, **options)
        if not stands_in(query.device):
            out[int(given[3][-1]) :] = torch.nan
        return out

    monkeypatch.setattr(attend, "paged_attention", worst)


CONFIG: dict[str, Any] = {"max_model_len": 96, "max_num_seqs": 6, "max_num_batched_tokens": 48, "debug_pages": True}


def _runner(
    directory: Path, with_graphs: bool, *, fails_at: int = -1, limit_s: float | None = None, **options: Any
) -> NativeRunner:
    config = EngineConfig(**{**CONFIG, **options})
    runner = NativeRunner(load_decoder(directory), config, num_pages=36)
    runner._fused = None  # a CPU's own pass keeps things on the host, which nothing could record
    if with_graphs:
        runner.graphs = DecodeGraphs(
            runner._decode,
            runner.sampling,
            max_num_seqs=6,
            max_context=96,
            slots_of_page=PAGE_SLOTS,
            device=CPU,
            recorder=Repeating(fails_at),  # type: ignore[arg-type]
            sizes=[1, 2, 3, 6],
        )
        runner.prompt_graphs = runner._make_prompt_graphs(runner.graphs)
        runner.warm_up(limit_s)
    return runner


REQUESTS: list[dict[str, Any]] = [
    {"max_tokens": 12},
    {"max_tokens": 9, "temperature": 0.8, "seed": 3},
    {"max_tokens": 14, "temperature": 1.0, "top_k": 5, "seed": 4, "logprobs": 2},
    {"max_tokens": 5, "temperature": 1.0, "presence_penalty": 1.0, "seed": 5},
    {"max_tokens": 3, "prompt_logprobs": 2},
    {"max_tokens": 20, "temperature": 0.7, "seed": 6},
    {"max_tokens": 10, "temperature": 0.9, "seed": 7},
]


def _answers(runner: NativeRunner, drafter: Any = None) -> list[Any]:
    """Prompts of one token, of some, and longer than a step; twice, so that the second time beginnings are cached."""
    engine = Engine(runner, config=runner.config, drafter=drafter)
    found = []
    for repeat in range(2):
        prompts = [[3 + i, *([7, 8, 9] * i), *range(40, 40 + 6 * i), repeat] for i in range(len(REQUESTS))]
        prompts[0] = [11]
        ids = [engine.submit(p, SamplingParams(**o)) for p, o in zip(prompts, REQUESTS, strict=True)]
        done: dict[int, Any] = {}
        while engine.has_work:
            done.update({o.request_id: o.completion for o in engine.step() if o.completion})
        found += [(done[i].token_ids, done[i].logprobs, done[i].prompt_logprobs) for i in ids]
    return found


def _assert_alike(mine: list[Any], expected: list[Any]) -> None:
    for (tokens, logprobs, scored), (ids, wanted, wanted_scores) in zip(mine, expected, strict=True):
        assert tokens == ids
        assert _numbers(logprobs) == pytest.approx(_numbers(wanted), abs=1e-4)
        assert _numbers(scored) == pytest.approx(_numbers(wanted_scores), abs=1e-4)


def _numbers(logprobs: Any) -> list[float]:
    return [entry.logprob for entry in logprobs or [] if entry is not None]


@pytest.mark.parametrize("step_ahead", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "mistral", "gpt2"])
def test_the_engine_says_the_same_with_graphs(family: str, step_ahead: bool, directory: Callable[[str], Path]) -> None:
    """Mixed steps, prompts in pieces, cached beginnings, prompts that are scored; windows that are full (mistral)."""
    plain = _answers(_runner(directory(family), with_graphs=False))
    runner = _runner(directory(family), with_graphs=True, step_ahead=step_ahead)
    _assert_alike(_answers(runner), plain)
    assert runner.prompt_graphs is not None
    stats = runner.prompt_graphs.stats
    assert stats.num_replays > 8 and stats.num_eager == 0 and stats.num_padding_rows > 0
    assert runner.graphs is not None and runner.graphs.stats.num_replays > 10


def test_guesses_are_verified_the_same_with_graphs(directory: Callable[[str], Path]) -> None:
    plain = _answers(_runner(directory("qwen2"), with_graphs=False))
    runner = _runner(directory("qwen2"), with_graphs=True)
    _assert_alike(_answers(runner, NgramDrafter(4, min_ngram=1)), plain)
    assert runner.prompt_graphs is not None and runner.prompt_graphs.stats.num_replays > 10
    assert runner.prompt_graphs.stats.num_eager == 0


def test_pages_of_fp8_hold_the_same_with_graphs(directory: Callable[[str], Path]) -> None:
    plain, mine = (_runner(directory("qwen2"), with_graphs=on, kv_dtype="fp8") for on in (False, True))
    _assert_alike(_answers(mine), _answers(plain))
    assert mine.prompt_graphs is not None and mine.prompt_graphs.stats.num_replays > 8
    assert plain.cache.key_scales is not None and mine.cache.key_scales is not None


def test_prompts_that_go_over_their_own_keys_are_left_to_that(
    directory: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = _runner(directory("qwen2"), with_graphs=True)
    asked: list[Sequence[int]] = []

    def fits(lengths: Sequence[int], *_: Any) -> bool:
        asked.append(lengths)
        return sum(lengths) >= 10

    monkeypatch.setattr(attend, "fits_fresh", fits)
    tail = [FreshTail((n,), 0, 1, 1) for n in (9, 10)]
    assert runner._recorded_hidden(step([9], context=9, fresh=tail[0])) is not None
    assert runner._recorded_hidden(step([10], context=10, fresh=tail[1])) is None
    assert asked == [(9,), (10,)]


def test_who_has_no_such_graphs(directory: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    runner = _runner(directory("qwen2"), with_graphs=True)
    graphs = runner.graphs
    assert graphs is not None and runner._make_prompt_graphs(graphs) is not None
    monkeypatch.setattr(runner, "config", replace(runner.config, batch_invariant=True))
    assert runner._make_prompt_graphs(graphs) is None
    monkeypatch.setattr(runner, "config", replace(runner.config, batch_invariant=False))
    shapes = AttentionShape("decode", 4, 1, 50), AttentionShape("mixed", 1, 20, 50, decoding=3)
    for shape, is_there in zip(shapes, (True, False), strict=True):
        monkeypatch.setattr(runner, "attention", AttentionKernels({}, {shape: ["another"]}))
        assert (runner._make_prompt_graphs(graphs) is not None) == is_there
    monkeypatch.setattr(runner, "attention", None)
    monkeypatch.setattr(prompt_graphs, "MOST_TOKENS", 0)
    assert runner._make_prompt_graphs(graphs) is None


def test_start_up_records_the_first_sizes_of_both_kinds_and_idle_moments_the_others(
    directory: Callable[[str], Path],
) -> None:
    runner = _runner(directory("qwen2"), with_graphs=True, limit_s=0.0)
    graphs, prompts = runner.graphs, runner.prompt_graphs
    assert graphs is not None and prompts is not None
    assert (graphs.stats.num_graphs, prompts.stats.num_graphs) == (3, 1), "of rows 6, 2 and 1; of 48 tokens"
    while runner.idle():
        pass
    assert (graphs.stats.num_graphs, prompts.stats.num_graphs) == (4, len(prompts.sizes))
    everything = _runner(directory("qwen2"), with_graphs=True)
    assert everything.graphs is not None and everything.graphs.stats.num_graphs == 4
    assert everything.prompt_graphs is not None
    assert everything.prompt_graphs.stats.num_graphs == len(everything.prompt_graphs.sizes)


def test_where_decoding_cannot_be_recorded_prompts_are_not_tried(directory: Callable[[str], Path]) -> None:
    runner = _runner(directory("qwen2"), with_graphs=True, fails_at=0)
    assert runner.prompt_graphs is None
    assert not runner.idle() or runner.prompt_graphs is None
    assert len(_answers(runner)) == 2 * len(REQUESTS)


# Kernels that are compiled ahead


OF_GPUS = ("BY_HAND", "OVERLAP", "launch_pdl", "maxnreg")
WIDE: dict[str, Any] = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_what_is_recorded_was_compiled_ahead(quantize: str | None, tmp_path: Path) -> None:
    """Every size, of the first contexts, by real tensors on a CPU that stands for a GPU whose kernels do nothing."""
    pytest.importorskip("triton")
    from triton.runtime.jit import JITFunction

    from tunesmith.kernels.prompt_inputs_triton import _load_kernel
    from tunesmith.kernels.warm_up import Launch, taken_down

    if not isinstance(_load_kernel, JITFunction):
        pytest.skip("Triton interprets here (TRITON_INTERPRET): nothing is compiled")
    (tmp_path / "config.json").write_text(json.dumps(WIDE), encoding="utf-8")
    sizes: dict[str, Any] = {"max_model_len": 256, "max_num_batched_tokens": 600, "max_num_seqs": 80}
    asked = Asked(str(tmp_path), quantize=quantize, dtype="bfloat16", weights="random", **sizes)
    h200 = Chip((9, 0), 132)
    with foreseeing(h200, "cpu"), kernels_on("cpu"):
        with taken_down():
            model: Any = load_for_inference(
                tmp_path, quantize=quantize, dtype="bfloat16", device="cpu", weights="random"
            )
            runner = NativeRunner(model, make_config(model, **sizes), num_pages=40)
        prompts = runner.prompt_graphs
        assert prompts is not None
        with taken_down() as launches:
            prompts.record()
            assert prompts(step([30, 1, 5])) is not None
        assert prompts.stats.num_graphs == len(prompts.sizes) > 15

    def key(launch: Launch) -> tuple[Any, ...]:
        kept = {name: value for name, value in launch.options.items() if name not in OF_GPUS}
        return replace(launch, options=kept).key

    foreseen = {key(launch) for launch in launches_of(asked, h200)}
    assert {launch.name for launch in launches if key(launch) not in foreseen} == set()
    names = [launch.name for launch in launches]
    assert names.count("_load_kernel") == len(prompts.sizes) + 1, "one launch before each replay"
