"""Adapters of many requests on a GPU: the kernels against the reference, recorded, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tunesmith.checkpoint.adapter import save_adapter
from tunesmith.checkpoint.load import load_decoder
from tunesmith.engine.adapter_stacks import attach
from tunesmith.engine.adapters import AdapterPool
from tunesmith.engine.config import EngineConfig
from tunesmith.engine.engine import Engine
from tunesmith.engine.request import SamplingParams
from tunesmith.engine.runner import NativeRunner
from tunesmith.kernels.multi_lora import (
    AdapterStack,
    add_multi_lora,
    add_multi_lora_reference,
    empty_stack,
    token_adapters,
    token_adapters_on_device,
)
from tunesmith.model.decoder import Decoder
from tunesmith.model.lora import AdapterOptions
from tunesmith.model.methods import adapted_linears, add_adapters, block_linears

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
# Columns of x, and rows of each projection: of a 7B's qkv and gate-up, and narrow ones.
SHAPES = {"qkv": (3584, (3584, 512, 512)), "gate_up": (3584, (18944, 18944)), "odd": (72, (130, 7))}
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """The reference's float32 products are float32's."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


def filled(shape: str, ranks: list[int], max_rank: int, dtype: torch.dtype) -> AdapterStack:
    width, parts = SHAPES[shape]
    stack = empty_stack(len(ranks), width, parts, max_rank, dtype, CUDA)
    stack.down_AQD.copy_(random(*stack.down_AQD.shape, dtype=dtype, seed=1) / width**0.5)
    stack.up_AFR.copy_(random(*stack.up_AFR.shape, dtype=dtype, seed=2) / max_rank**0.5)
    held = [[rank if part != 1 else max(0, rank - 8) for part in range(len(parts))] for rank in ranks]
    stack.ranks_AP.copy_(torch.tensor(held))
    stack.ranks[:] = held
    return stack


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 64, 700])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_the_reference(shape: str, tokens: int, dtype: torch.dtype) -> None:
    stack = filled(shape, [16, 8, 33, 64], 64, dtype)
    slots = np.random.default_rng(tokens).integers(-1, 4, tokens).astype(np.int32)
    slots[0] = 2
    x, y = random(tokens, SHAPES[shape][0], dtype=dtype, seed=3), random(tokens, stack.up_AFR.shape[1], dtype=dtype)
    chosen = token_adapters(slots, 4, CUDA)
    assert chosen.order_T is not None
    truth, mine = y.clone(), y.clone()
    add_multi_lora_reference(truth, x, stack, chosen)
    add_multi_lora(mine, x, stack, chosen)
    torch.testing.assert_close(mine, truth, rtol=LIMITS[dtype], atol=LIMITS[dtype])
    on_device = y.clone()
    add_multi_lora(on_device, x, stack, token_adapters_on_device(torch.from_numpy(slots).cuda(), 4))
    assert torch.equal(on_device, mine)
    # Alone, the same bits: where the tile is the same.
    invariant = y.clone()
    add_multi_lora(invariant, x, stack, token_adapters(slots, 4, CUDA, invariant=True))
    alone = y[:1].clone()
    add_multi_lora(alone, x[:1], stack, token_adapters(slots[:1], 4, CUDA, invariant=True))
    assert torch.equal(alone[0], invariant[0])


def test_a_recorded_pass_reads_who_has_which_adapter_at_every_replay() -> None:
    stack = filled("qkv", [16, 8, 16, 4], 16, torch.bfloat16)
    x, y = random(24, 3584, dtype=torch.bfloat16, seed=3), random(24, 4608, dtype=torch.bfloat16)
    out, slots = y.clone(), torch.full((24,), -1, dtype=torch.int32, device="cuda")

    def work() -> None:
        out.copy_(y)
        add_multi_lora(out, x, stack, token_adapters_on_device(slots, 4))

    work()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        work()
    for seed in range(3):
        wanted = np.random.default_rng(seed).integers(-1, 4, 24).astype(np.int32)
        slots.copy_(torch.from_numpy(wanted))
        graph.replay()
        truth = y.clone()
        add_multi_lora(truth, x, stack, token_adapters(wanted, 4, CUDA))
        assert torch.equal(out, truth)


def random_adapter(base: Path, out: Path, seed: int) -> Path:
    model = load_decoder(base, device="cpu", dtype=torch.float32)
    chosen = {target.path: list(target.parts) for target in block_linears(model)}
    add_adapters(model, chosen, lambda name: AdapterOptions(1 + (len(name) + seed) % 8, 6.0), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for linear in adapted_linears(model).values():
            for parameter in linear.adapters.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    save_adapter(model, out, base)
    return out


def answers(model: Decoder, folders: list[Path], *, enforce_eager: bool) -> tuple[list[list[int]], int]:
    """Of twelve requests with and without adapters; and how many graphs there were."""
    pool = AdapterPool(model, 3, 8)
    try:
        for folder in folders:
            pool.load(folder.name, folder)
        config = EngineConfig(
            max_model_len=128, max_num_seqs=16, max_num_batched_tokens=256, step_ahead=True, enforce_eager=enforce_eager
        )
        runner = NativeRunner(model, config, 200)
        attach(pool.stacks, runner)
        runner.warm_up()
        engine = Engine(runner, config=config, adapters=pool)
        names = [None, *(folder.name for folder in folders)]
        ids = [
            engine.submit([7, 8, 9 + n] * 5, SamplingParams(max_tokens=40), adapter=names[n % len(names)])
            for n in range(12)
        ]
        done: dict[int, list[int]] = {}
        while engine.has_work:
            done.update({o.request_id: o.completion.token_ids for o in engine.step() if o.completion is not None})
        num_graphs = 0 if runner.graphs is None else runner.graphs.stats.num_replays
        return [done[i] for i in ids], num_graphs
    finally:
        pool.close()


def test_recorded_steps_with_adapters_say_what_launched_ones_say(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny_model_dir("qwen3", initializer_range=0.2, hidden_size=64, intermediate_size=128)
    folders = [random_adapter(base, tmp_path / name, seed) for seed, name in enumerate("abc")]
    model = load_decoder(base, device="cuda", dtype=torch.float32).eval()
    launched, _ = answers(model, folders, enforce_eager=True)
    recorded, num_graphs = answers(model, folders, enforce_eager=False)
    assert recorded == launched
    assert num_graphs > 0
    cpu = load_decoder(base, device="cpu", dtype=torch.float32).eval()
    assert launched == answers(cpu, folders, enforce_eager=True)[0]


def test_what_adapters_cost_a_decoding_step() -> None:
    """64 tokens of 8 adapters of rank 16, beside the product they are added to: the median of 50, printed."""
    for shape in ("qkv", "gate_up"):
        stack = filled(shape, [16] * 8, 16, torch.bfloat16)
        weight = random(stack.up_AFR.shape[1], SHAPES[shape][0], dtype=torch.bfloat16)
        for tokens in (1, 64, 4096):
            x = random(tokens, SHAPES[shape][0], dtype=torch.bfloat16, seed=3)
            y = x @ weight.t()
            chosen = token_adapters(np.arange(tokens, dtype=np.int32) * 8 // tokens, 8, CUDA)
            product = _median_us(lambda x=x, weight=weight: x @ weight.t())  # type: ignore[misc]
            added = _median_us(lambda x=x, y=y, chosen=chosen, stack=stack: add_multi_lora(y, x, stack, chosen))  # type: ignore[misc]
            print(f"{shape} {tokens} tokens: product {product:.1f} us, adapters {added:.1f} us")
            assert added < 3 * product + 60


def _median_us(work: Callable[[], object]) -> float:
    work()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(10):
            work()
    times = []
    for _ in range(50):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 100)
    return float(np.median(times))
