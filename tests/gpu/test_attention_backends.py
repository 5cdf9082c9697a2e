"""Other libraries' attention over pages on a GPU, where they are installed: the right values, recorded steps too."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "kernels"))
from paged_batches import PagedBatch, make_batch

from tunesmith.engine.attention_backends import AttentionKernels, attention_facts, find_kernels
from tunesmith.engine.config import EngineConfig
from tunesmith.engine.llm import LLM
from tunesmith.engine.request import SamplingParams
from tunesmith.kernels import flash_attention_3, flashinfer_attention
from tunesmith.kernels.flash_attention_3 import FlashAttention3
from tunesmith.kernels.flashinfer_attention import FlashInferAttention
from tunesmith.kernels.paged_step import HostLengths, PagedHeads, PagedKernel, PagedStep

pytestmark = pytest.mark.gpu
STEPS = {
    "decode": ([1] * 9, [5, 130, 3000, 1, 16, 17, 512, 513, 2048]),
    "mixed": ([1, 20, 3, 1, 500, 129], [5, 20, 3000, 1700, 800, 129]),
    "drafts": ([5] * 4, [700, 5, 64, 3000]),
}
HEADS = [(28, 4, 128), (16, 8, 128), (14, 2, 64), (32, 32, 64), (8, 1, 256)]
CONFIG = EngineConfig(max_model_len=4096, max_num_seqs=32)
INSTALLED = {
    flash_attention_3.NAME: (flash_attention_3.is_installed, FlashAttention3),
    flashinfer_attention.NAME: (flashinfer_attention.is_installed, FlashInferAttention),
}


def heads_of(heads: tuple[int, int, int], dtype: torch.dtype = torch.bfloat16) -> PagedHeads:
    windows = (None, 300)
    return PagedHeads(*heads, dtype, dtype, 16, windows, torch.cuda.get_device_capability())


def kernel_for(name: str, heads: PagedHeads) -> PagedKernel:
    """Or a skip that says why."""
    is_installed, make = INSTALLED[name]
    if not is_installed():
        pytest.skip(f"{name} is not installed")
    kernel: PagedKernel = make()
    if reason := kernel.refused(heads):
        pytest.skip(reason)
    return kernel


def step_of(batch: PagedBatch) -> PagedStep:
    host = HostLengths(*(tensor.cpu().numpy() for tensor in (batch.starts, batch.context, batch.tables)))
    least = int(batch.starts.diff().min())
    return PagedStep(batch.tables, batch.starts, batch.context, batch.max_query, batch.max_context, least, host)


def run(kernel: PagedKernel, batch: PagedBatch, step: PagedStep, window: int | None = None) -> Tensor:
    query = batch.query[: int(batch.starts[-1])]
    scale = query.shape[2] ** -0.5
    with torch.inference_mode():
        return kernel(query, batch.keys, batch.values, step, window=window, scale=scale)


def assert_near(mine: Tensor, batch: PagedBatch, window: int | None = None) -> None:
    limit = {torch.float16: 4e-3, torch.bfloat16: 3e-2}[mine.dtype]
    torch.testing.assert_close(mine, batch.truth(window), rtol=limit, atol=limit)


@pytest.mark.parametrize("name", INSTALLED)
@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_equals_the_reference(heads: tuple[int, int, int], kind: str, name: str) -> None:
    """Over pages that hold no numbers wherever nothing may be read."""
    for dtype in (torch.bfloat16, torch.float16):
        kernel = kernel_for(name, heads_of(heads, dtype))
        batch = make_batch(*STEPS[kind], heads, dtype, device="cuda")
        step = step_of(batch)
        for window in (None, 300):
            assert_near(run(kernel, batch, step, window), batch, window)
            assert_near(run(kernel, batch, step, window), batch, window)


def test_a_recorded_step_serves_other_contexts() -> None:
    kernel = kernel_for(flash_attention_3.NAME, heads_of((28, 4, 128)))
    batch = make_batch(*STEPS["decode"], (28, 4, 128), torch.bfloat16, device="cuda")
    step = replace(step_of(batch), host=None)
    run(kernel, batch, step)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = run(kernel, batch, step)
    for shift in range(3):
        batch.context.copy_(batch.context.roll(shift))
        batch.tables.copy_(batch.tables.roll(shift, dims=0))
        graph.replay()
        assert_near(out, batch)


def test_plans_of_steps_that_are_on_their_way() -> None:
    """Nothing waits between them: a plan's buffer is not filled anew before it was copied."""
    kernel = kernel_for(flashinfer_attention.NAME, heads_of((28, 4, 128)))
    batches = [
        make_batch(*STEPS["mixed"], (28, 4, 128), torch.bfloat16, seed=seed, device="cuda") for seed in range(12)
    ]
    for number, batch in enumerate(batches):
        batch.context.sub_(number)
        batch.context.clamp_(min=batch.starts.diff())
    steps = [step_of(batch) for batch in batches]
    busy = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    for _ in range(20):
        busy = (busy @ busy).tanh()
    found = [run(kernel, batch, step) for batch, step in zip(batches, steps, strict=True)]
    for mine, batch in zip(found, batches, strict=True):
        assert_near(mine, batch)


def test_they_are_measured_and_the_choice_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    heads, device = heads_of((28, 4, 128)), torch.device("cuda", torch.cuda.current_device())
    if not any(is_installed() for is_installed, _ in INSTALLED.values()):
        assert find_kernels(CONFIG, heads, device) is None
        pytest.skip("neither FlashAttention-3 nor FlashInfer is installed")
    first = find_kernels(CONFIG, heads, device)
    if first is None:
        pytest.skip("what is installed is not for this GPU")
    assert isinstance(first, AttentionKernels) and not first.measured.dropped
    print(first.facts())
    again = find_kernels(CONFIG, heads, device)
    assert again is not None and again.facts() == first.facts()


@pytest.mark.parametrize("name", INSTALLED)
@pytest.mark.parametrize("enforce_eager", [True, False], ids=["eager", "graphs"])
def test_an_engine_says_what_it_says_with_ours(
    name: str, enforce_eager: bool, tiny_model_dir: Callable[..., Path]
) -> None:
    """The same tokens, up to where two are all but equal: there both ways find them equally likely."""
    directory = tiny_model_dir("llama", head_dim=64, hidden_size=256, initializer_range=0.1)
    kernel_for(name, heads_of((4, 2, 64)))
    options = {"dtype": "bfloat16", "max_num_seqs": 4, "enforce_eager": enforce_eager, "gpu_memory_utilization": 0.3}
    prompts = [list(range(5, 5 + length)) for length in (3, 40, 130)]
    params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, logprobs=1)
    said = LLM(directory, **options, attention_backend="triton").generate(prompts, params)
    theirs = LLM(directory, **options, attention_backend=name)
    facts = attention_facts(theirs.runner)
    assert facts is not None and facts["asked"] == name
    for one, other in zip(said, theirs.generate(prompts, params), strict=True):
        assert one.logprobs is not None and other.logprobs is not None
        for mine, its in zip(one.logprobs, other.logprobs, strict=True):
            assert abs(mine.logprob - its.logprob) < 0.1
            if mine.token_id != its.token_id:
                break
