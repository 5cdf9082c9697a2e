"""Decoding, and small steps with prompts, as CUDA graphs: the tokens of the engine without them, the ladder, its
memory, no waiting in the loop, and what a step costs the host."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tunesmith.checkpoint.load import load_decoder
from tunesmith.engine.batching import HostBatch, to_device
from tunesmith.engine.config import EngineConfig
from tunesmith.engine.engine import Engine
from tunesmith.engine.graphs import ladder
from tunesmith.engine.prompt_graphs import Size, first_sizes
from tunesmith.engine.recorder import CudaRecorder
from tunesmith.engine.request import SamplingParams
from tunesmith.engine.runner import NativeRunner
from tunesmith.engine.speculate import NgramDrafter

pytestmark = pytest.mark.gpu
Guard = Callable[[], AbstractContextManager[None]]
Make = Callable[..., Path]
SHAPE = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}
REQUESTS: list[dict[str, Any]] = [
    {"max_tokens": 30},
    {"max_tokens": 25, "temperature": 0.8, "seed": 3},
    {"max_tokens": 14, "temperature": 1.0, "top_k": 5, "seed": 4, "logprobs": 2},
    {"max_tokens": 5, "temperature": 1.0, "presence_penalty": 1.0, "seed": 5},
    {"max_tokens": 1},
    {"max_tokens": 40, "temperature": 0.7, "seed": 6},
    {"max_tokens": 33, "temperature": 0.9, "top_p": 0.9, "seed": 7},
    {"max_tokens": 12, "temperature": 0.9, "seed": 8},
]


def _runner(directory: Path, max_num_seqs: int, dtype: torch.dtype = torch.float32, **options: Any) -> NativeRunner:
    config = EngineConfig(
        max_model_len=128, max_num_seqs=max_num_seqs, max_num_batched_tokens=256, debug_pages=True, **options
    )
    decoder = load_decoder(directory, device="cuda", dtype=dtype).eval()
    runner = NativeRunner(decoder, config, num_pages=12 * max_num_seqs)
    runner.warm_up()
    if runner.prompt_graphs is not None:
        runner.prompt_graphs.host_s = 1.0  # of a tiny model launches may cost less than a replay
    return runner


def _answers(runner: NativeRunner, engine: Engine | None = None) -> list[list[int]]:
    engine = Engine(runner, config=runner.config) if engine is None else engine
    prompts = [list(range(3 + i, 3 + i + (1 if i % 3 == 0 else 9 * i))) for i in range(len(REQUESTS))]
    ids = [engine.submit(p, SamplingParams(**o)) for p, o in zip(prompts, REQUESTS, strict=True)]
    done = {}
    while engine.has_work:
        done.update({o.request_id: o.completion for o in engine.step() if o.completion})
    found = []
    for i in ids:
        completion = done[i]
        assert completion is not None and completion.finish_reason == "length"
        found.append(completion.token_ids)
    return found


@pytest.mark.parametrize("step_ahead", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gpt2"])
def test_tokens_are_those_of_the_engine_without_graphs(family: str, step_ahead: bool, tiny_model_dir: Make) -> None:
    directory = tiny_model_dir(family, **(SHAPE if family != "gpt2" else {}))
    plain = _answers(_runner(directory, 6, enforce_eager=True))
    runner = _runner(directory, 6, step_ahead=step_ahead)
    assert runner.graphs is not None and not runner.graphs.refused
    assert _answers(runner) == plain
    stats = runner.graphs.stats
    assert stats.num_graphs == len(ladder(6))
    assert stats.num_replays > 20 and stats.num_eager == 0 and stats.num_padding_rows > 0
    prompts = runner.prompt_graphs
    assert prompts is not None and not prompts.refused
    assert prompts.stats.num_graphs == len(prompts.sizes)
    assert prompts.stats.num_replays > 0 and prompts.stats.num_eager == 0 and prompts.stats.num_padding_rows > 0
    runner.graphs.drop()
    assert _answers(runner) == plain
    assert runner.graphs.stats.num_replays == stats.num_replays, "nothing was recorded again yet"
    runner.warm_up()
    assert _answers(runner) == plain
    assert runner.graphs.stats.num_replays > stats.num_replays


def test_logits_that_are_borrowed_are_the_models(tiny_model_dir: Make) -> None:
    """Of every size, after all others were recorded into the same memory."""
    runner = _runner(tiny_model_dir("qwen2", **SHAPE), 16)
    assert runner.graphs is not None
    graphs = runner.graphs
    for made in list(graphs._graphs[graphs.first_kind].values()):
        batch = graphs._static_batch(graphs.first_kind, made.num_rows)
        inputs = made.inputs
        inputs.tokens.copy_(torch.arange(made.num_rows, device="cuda") + 7)
        inputs.contexts.fill_(1)
        inputs.positions.zero_()
        inputs.slots.copy_(torch.arange(made.num_rows, device="cuda") * 16)
        inputs.tables[:, 0] = torch.arange(made.num_rows, device="cuda")
        with torch.inference_mode():
            expected = runner._decode(batch)
            made.replay()
        torch.testing.assert_close(made.decoded.logits_BV, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(made.decoded.tokens_B, expected.argmax(-1)), "rows of the padding slot are greedy"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_borrowed_memory_is_a_view_that_holds_nothing(dtype: torch.dtype) -> None:
    recorder = CudaRecorder(torch.device("cuda", torch.cuda.current_device()))
    tensor = torch.randn(3, 5, device="cuda").to(dtype)
    before = torch.cuda.memory_allocated()
    borrowed = recorder.borrow(tensor)
    assert (borrowed.shape, borrowed.dtype, borrowed.data_ptr()) == (tensor.shape, dtype, tensor.data_ptr())
    assert torch.equal(borrowed, tensor)
    tensor.add_(1)
    assert torch.equal(borrowed, tensor)
    del tensor
    assert torch.cuda.memory_allocated() < before


def test_smaller_sizes_fit_into_the_memory_of_the_largest(tiny_model_dir: Make) -> None:
    """A wide vocabulary: were logits kept for each size, they would take 17 times those of the largest."""
    runner = _runner(tiny_model_dir("llama", vocab_size=50_000), 256, torch.bfloat16)
    assert runner.graphs is not None
    stats = runner.graphs.stats
    print(f"{stats.num_graphs} graphs, {stats.seconds:.2f} s, {stats.num_bytes / 2**20:.0f} MiB")
    assert stats.num_graphs == len(ladder(256))
    logits_bytes = 256 * 50_000 * 2
    assert stats.num_bytes < 8 * logits_bytes + 2**27
    assert stats.seconds < 60


def test_launching_a_step_never_waits_for_the_device(tiny_model_dir: Make, no_waiting: Guard) -> None:
    runner = _runner(tiny_model_dir("qwen2", **SHAPE), 6, step_ahead=True)
    engine = Engine(runner, config=runner.config)
    expected = _answers(runner, engine)  # what happens at first calls only (kernels, buffers) may wait
    forward, sample = runner.forward, runner.sample

    def guarded(work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            with no_waiting():
                return work(*given)

        return run

    runner.forward, runner.sample = guarded(forward), guarded(sample)  # type: ignore[method-assign]
    assert _answers(runner, engine) == expected


def test_a_mixture_of_experts_answers_whether_it_can_be_recorded_or_not(tiny_model_dir: Make) -> None:
    directory = tiny_model_dir("mixtral")
    plain = _answers(_runner(directory, 4, enforce_eager=True))
    runner = _runner(directory, 4)
    assert runner.graphs is not None
    assert _answers(runner) == plain
    assert runner.graphs.refused or runner.graphs.stats.num_replays


def _step(counts: list[int], contexts: list[int], seed: int = 0) -> HostBatch:
    """Random tokens of requests whose pages lie one behind the other, eight of each."""
    starts = np.append(0, np.cumsum(counts))
    owner = np.repeat(np.arange(len(counts)), counts)
    positions = np.arange(starts[-1]) - (starts[1:] - np.array(contexts))[owner]
    none = np.zeros(0, dtype=np.int64)
    return HostBatch(
        tokens=np.random.default_rng(seed).integers(3, 250, starts[-1]),
        positions=positions,
        slots=owner * 128 + positions,
        starts=starts,
        contexts=np.array(contexts),
        tables=np.arange(8 * len(counts), dtype=np.int32).reshape(-1, 8),
        sequence_slots=np.arange(len(counts)),
        sample_rows=starts[1:] - 1,
        adapters=None,
        score_rows=none,
        score_targets=none,
        num_scored_top=0,
        is_decode=False,
    )


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "limit"),
    [(torch.float32, "auto", 1e-3), (torch.float32, "fp8", 2e-2), (torch.bfloat16, "auto", 8e-2)],
)
@pytest.mark.parametrize(("family", "more"), [("qwen3", {}), ("mistral", {"sliding_window": 40}), ("gpt2", {})])
def test_hidden_states_of_prompts_are_those_of_launches(
    family: str, more: dict[str, Any], dtype: torch.dtype, kv_dtype: str, limit: float, tiny_model_dir: Make
) -> None:
    """Prompts, pieces behind a context, decoding and guesses beside them, in every size that holds them."""
    directory = tiny_model_dir(family, **(SHAPE if family != "gpt2" else {}), **more)
    runner = _runner(directory, 8, dtype, kv_dtype=kv_dtype)
    prompts = runner.prompt_graphs
    assert prompts is not None and not prompts.refused
    steps = [_step([60, 5, 90], [60, 5, 90]), _step([1, 30, 5, 1], [61, 35, 95, 1], 1), _step([5], [66], 2)]
    for host in steps:  # so that all that is read was written
        with runner._passing():
            runner.hidden(to_device(host, runner.device))
    for size in prompts.sizes:
        made = prompts._graphs[prompts.contexts[0]][size]
        for host in steps:
            batch = to_device(host, runner.device)
            if not size.holds(Size(batch.num_tokens, batch.num_requests)):
                continue
            with runner._passing():
                expected = runner.hidden(batch).clone()
                kept = prompts._graphs
                prompts._graphs = {prompts.contexts[0]: {size: made}}
                found = prompts(batch)
                prompts._graphs = kept
            assert found is not None and torch.isfinite(found).all()
            torch.testing.assert_close(found, expected, rtol=limit, atol=limit)


def test_prompts_are_recorded_at_start_up_and_sizes_share_memory(tiny_model_dir: Make) -> None:
    config = EngineConfig(max_model_len=2048, max_num_seqs=64)
    decoder = load_decoder(tiny_model_dir("qwen2", **SHAPE), device="cuda", dtype=torch.bfloat16).eval()
    runner = NativeRunner(decoder, config, num_pages=256)
    runner.warm_up(0.0)
    prompts = runner.prompt_graphs
    assert prompts is not None and prompts.stats.num_graphs == len(first_sizes(prompts.sizes)) == 4
    at_start = prompts.stats
    while prompts.record_next():
        pass
    stats = prompts.stats
    print(f"{at_start.num_graphs} graphs, {at_start.seconds:.2f} s, {at_start.num_bytes / 2**20:.0f} MiB")
    print(f"{stats.num_graphs} graphs, {stats.seconds:.2f} s, {stats.num_bytes / 2**20:.0f} MiB")
    print(f"launches {1e3 * prompts.host_s:.2f} ms")
    for size, made in sorted(prompts._graphs[2048].items()):
        print(size, f"{1e3 * made.device_s:.2f} ms")
    assert stats.num_bytes < at_start.num_bytes + 2**27


def test_guesses_are_verified_as_without_graphs(tiny_model_dir: Make) -> None:
    directory = tiny_model_dir("qwen2", **SHAPE)
    eager, runner = _runner(directory, 6, enforce_eager=True), _runner(directory, 6)
    plain, mine = (
        _answers(one, Engine(one, config=one.config, drafter=NgramDrafter(4, min_ngram=1))) for one in (eager, runner)
    )
    assert mine == plain
    assert runner.prompt_graphs is not None and runner.prompt_graphs.stats.num_replays > 10


def test_a_step_of_a_short_prompt_costs_the_host_little(tiny_model_dir: Make) -> None:
    directory = tiny_model_dir("qwen2", **SHAPE, num_hidden_layers=24)
    found = {}
    for eager in (True, False):
        runner = _runner(directory, 8, torch.bfloat16, enforce_eager=eager)
        batch = to_device(_step([100], [100]), runner.device)
        taken = []
        for _ in range(20):
            torch.cuda.synchronize()
            started = time.perf_counter()
            runner.forward(batch)
            taken.append(time.perf_counter() - started)
        found[eager] = sorted(taken)[10]
    print(f"host, 24 layers: launch by launch {1e3 * found[True]:.2f} ms, as a graph {1e3 * found[False]:.2f} ms")
    assert 2 * found[False] < found[True]
