"""Decoding as CUDA graphs: the tokens of the engine without them, the ladder, its memory, no waiting in the loop."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.checkpoint.load import load_decoder
from tunesmith.engine.config import EngineConfig
from tunesmith.engine.engine import Engine
from tunesmith.engine.graphs import ladder
from tunesmith.engine.recorder import CudaRecorder
from tunesmith.engine.request import SamplingParams
from tunesmith.engine.runner import NativeRunner

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
