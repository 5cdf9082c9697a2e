"""The engine on a CUDA device: its pages and its attention give what the training forward gives there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.checkpoint.load import load_decoder
from tunesmith.engine.llm import LLM
from tunesmith.engine.probe import probe_runner, stepwise_logits
from tunesmith.engine.runner import GROUP_ROWS
from tunesmith.errors import DeviceError
from tunesmith.model.language_model import logits

pytestmark = pytest.mark.gpu
# Largest difference over largest logit: rounding of the dtype, a few times over.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("family", ["qwen2", "mistral", "gpt2"])
def test_prefill_equals_decode_equals_training(
    family: str, dtype: torch.dtype, tiny_model_dir: Callable[..., Path]
) -> None:
    model = load_decoder(tiny_model_dir(family, initializer_range=0.1), device="cuda", dtype=dtype).eval()
    ids = torch.randint(0, 256, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    whole = logits(model, [ids])[0].float()
    decoded = stepwise_logits(probe_runner(model, 128), ids, range(1, 61)).float()
    assert (decoded - whole).abs().max() / whole.abs().max() < TOLERANCES[dtype]


def test_rows_of_a_product_do_not_depend_on_their_place() -> None:
    """What batch-invariant mode rests on: with one shape there is one order of summation, for every row."""
    generator = torch.Generator("cuda").manual_seed(0)
    for features, width in ((4096, 4096), (6144, 1024), (151936, 1024), (18944, 3584), (3584, 18944), (2048, 3072)):
        weight = torch.randn(features, width, device="cuda", dtype=torch.bfloat16, generator=generator)
        x = torch.randn(GROUP_ROWS, width, device="cuda", dtype=torch.bfloat16, generator=generator)
        whole = torch.nn.functional.linear(x, weight)
        order = torch.randperm(GROUP_ROWS, device="cuda", generator=generator)
        assert torch.equal(torch.nn.functional.linear(x[order], weight), whole[order]), (features, width)


def answers(llm: LLM, prompts: list[list[int]], **options: Any) -> list[Any]:
    params = {"max_tokens": 24, "ignore_eos": True, "logprobs": 2, **options}
    return [(c.token_ids, c.logprobs) for c in llm.generate(prompts, **params)]


def random_prompts(lengths: tuple[int, ...]) -> list[list[int]]:
    return [torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]


@pytest.mark.parametrize("enforce_eager", [True, False], ids=["eager", "graphs"])
@pytest.mark.parametrize("family", ["qwen3", "mistral", "gpt2", "mixtral"])
def test_batch_invariant_answers_are_the_same_bits(
    family: str, enforce_eager: bool, tiny_model_dir: Callable[..., Path]
) -> None:
    """Alone, among others, from the cache, in pieces, and after a preemption."""
    wide = {"n_embd": 64} if family == "gpt2" else {"hidden_size": 64}
    directory = tiny_model_dir(family, initializer_range=0.2, **wide)
    common = {
        "device": "cuda",
        "dtype": "bfloat16",
        "batch_invariant": True,
        "enforce_eager": enforce_eager,
        "debug_pages": True,
        "max_model_len": 256,
    }
    prompts = random_prompts((37, 5, 64, 18, 130))
    llm = LLM(directory, max_num_seqs=8, **common)
    alone = [answers(llm, [prompt])[0] for prompt in prompts]
    assert answers(llm, prompts) == alone
    assert llm.engine.stats().prefix_hits_tokens > 0
    pieces = LLM(directory, max_num_seqs=4, max_num_batched_tokens=29, **common)
    assert answers(pieces, prompts) == alone


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_graphs_and_steps_ahead_change_nothing(kv_cache_dtype: str, tiny_model_dir: Callable[..., Path]) -> None:
    """Float32, where a decode alone and one in a batch differ by rounding that no greedy choice hangs on."""
    directory = tiny_model_dir("qwen3", hidden_size=64, initializer_range=0.2)
    common = {"device": "cuda", "dtype": "float32", "kv_cache_dtype": kv_cache_dtype, "max_model_len": 256}
    prompts = random_prompts((3, 50, 7, 20, 90, 33))
    recorded = LLM(directory, max_num_seqs=4, debug_pages=True, **common)
    assert recorded.runner.graphs is not None
    assert recorded.engine.config.step_ahead
    eager = LLM(directory, max_num_seqs=4, enforce_eager=True, **common)
    for options in ({}, {"temperature": 0.9, "seed": 3}, {"temperature": 0.9, "seed": 3, "top_p": 0.8}):
        mine = [tokens for tokens, _ in answers(recorded, prompts, logprobs=None, **options)]
        assert mine == [tokens for tokens, _ in answers(eager, prompts, logprobs=None, **options)]
    assert recorded.runner.graphs.stats.num_replays > 20
    assert recorded.runner.pages.num_used == 0


def test_the_cache_takes_the_share_that_was_asked_for(tiny_model_dir: Callable[..., Path]) -> None:
    directory = tiny_model_dir("qwen3", hidden_size=64, num_key_value_heads=4)
    free, total = torch.cuda.mem_get_info()
    share = (total - free) / total + 0.05
    llm = LLM(
        directory,
        device="cuda",
        gpu_memory_utilization=share,
        max_num_seqs=100_000,
        enforce_eager=True,
        max_num_batched_tokens=100_000,
    )
    after, _ = torch.cuda.mem_get_info()
    assert (total - after) / total <= share + 0.01
    assert llm.runner.cache.capacity_bytes > 0.01 * total
    with pytest.raises(DeviceError, match="are left for it"):
        LLM(directory, device="cuda", gpu_memory_utilization=1e-6)


def test_recorded_steps_are_within_the_share_too(tiny_model_dir: Callable[..., Path]) -> None:
    """Graphs of 256 rows over a wide vocabulary take hundreds of MiB, which the cache once was given as well."""
    directory = tiny_model_dir("qwen3", hidden_size=64, num_key_value_heads=4, vocab_size=150_000)
    free, total = torch.cuda.mem_get_info()
    share = (total - free) / total + 0.1
    llm = LLM(directory, device="cuda", gpu_memory_utilization=share, max_num_seqs=256, max_model_len=512)
    graphs = llm.runner.graphs
    while llm.engine.idle():
        pass
    after, _ = torch.cuda.mem_get_info()
    print(f"{graphs.stats.num_graphs} graphs took {graphs.stats.num_bytes / 2**20:.0f} MiB")
    assert not graphs.refused and graphs.stats.num_bytes > 0
    assert (total - after) / total <= share + 0.01
    llm.generate([[1, 2, 3]] * 256, max_tokens=20, ignore_eos=True)
    after, _ = torch.cuda.mem_get_info()
    assert (total - after) / total <= share + 0.01


def test_sampling_on_the_device_is_reproducible(tiny_model_dir: Callable[..., Path]) -> None:
    llm = LLM(tiny_model_dir("qwen2"), device="cuda", max_running=3)
    prompts = ["one", "two, longer", "three"]
    first = llm.generate(prompts, max_tokens=20, temperature=1.0, seed=1)
    again = llm.generate(prompts, max_tokens=20, temperature=1.0, seed=1)
    assert [c.token_ids for c in first] == [c.token_ids for c in again]
    greedy = llm.generate(prompts, max_tokens=20)
    on_cpu = LLM(tiny_model_dir("qwen2"), device="cpu").generate(prompts, max_tokens=20)
    assert [c.token_ids[0] for c in greedy] == [c.token_ids[0] for c in on_cpu]
