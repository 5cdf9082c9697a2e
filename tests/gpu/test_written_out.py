"""Norms of heads, dropout and DoRA written out, on a GPU: against the eager blocks, under graphs, and in bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.checkpoint.load import load_decoder
from tunesmith.kernels.column_dot import column_dot, column_dot_reference
from tunesmith.kernels.dropout import Noise, add_dropout_, add_dropout_reference_, dropout, dropout_reference, kept
from tunesmith.kernels.fp8 import has_fp8
from tunesmith.model.captured import CapturedBlocks
from tunesmith.model.decoder import Decoder
from tunesmith.model.methods import apply_method
from tunesmith.model.packed import PackedTokens, pack_documents
from tunesmith.recipe.schema import MethodSection

pytestmark = pytest.mark.gpu
Make = Callable[..., Path]
SEED = 11
EVEN = [64, 64, 64, 64]
RAGGED = [100, 28, 1, 127]
LARGE = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "lora": {"kind": "lora"},
    "dropout": {"kind": "lora", "dropout": 0.3},
    "nf4 dropout": {"kind": "qlora", "dropout": 0.3},
    "dora": {"kind": "lora", "dora": True},
    "nf4 dora": {"kind": "qlora", "dora": True},
    "fp8 dora": {"kind": "lora", "base": "fp8", "fp8_blocks": "all", "dora": True},
    "fp8 dropout": {"kind": "lora", "base": "fp8", "fp8_blocks": "all", "dropout": 0.3},
}


@pytest.fixture(autouse=True)
def _exact_products() -> Any:
    held = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = held


def _decoder(directory: Path, method: str, dtype: torch.dtype) -> Decoder:
    section = MethodSection(**{"rank": 4, **METHODS[method]})
    if section.base == "fp8" and not has_fp8("cuda"):
        pytest.skip("fp8 needs sm_89 or newer")
    decoder = load_decoder(directory, device="cuda", dtype=dtype, quantize=section.quantisation).train()
    apply_method(decoder, section, seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith(".B"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            elif name.endswith("magnitude"):
                parameter.mul_(1.1)
    decoder.is_fused = True
    return decoder


def _pack(lengths: list[int], seed: int = 0) -> PackedTokens:
    generator = torch.Generator().manual_seed(seed)
    return pack_documents([torch.randint(1, 60, (n,), generator=generator).tolist() for n in lengths], "cuda")


def _results(decoder: Decoder, packs: list[PackedTokens]) -> dict[str, Tensor]:
    """The hidden states, and gradients summed over the packs, from a fixed seed."""
    decoder.zero_grad(set_to_none=True)
    torch.manual_seed(SEED)
    found = {}
    for index, pack in enumerate(packs):
        hidden = decoder.hidden(pack)
        # Weighted unevenly: the sum of squares of what a norm gives is nearly a constant.
        weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(index)).to(hidden.device)
        (hidden.float() * weights).sum().backward()
        found[f"hidden {index}"] = hidden.detach().clone()
    return found | {n: p.grad.clone() for n, p in decoder.named_parameters() if p.grad is not None}


def _assert_close(expected: dict[str, Tensor], found: dict[str, Tensor], tolerance: float) -> None:
    assert expected.keys() == found.keys()
    for name, truth in expected.items():
        error = (found[name].float() - truth.float()).norm() / truth.float().norm().clamp(min=1e-6)
        assert float(error) < tolerance, f"{name}: {float(error):.1e}"


@pytest.fixture
def _same_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The eager linears take the masks that the written-out form draws, site after site, in one pass."""
    sites = iter(range(1000))

    def drop(x_TD: Tensor, probability: float) -> Tensor:
        generator = torch.Generator("cuda").manual_seed(SEED)
        noise = Noise(torch.randint(2**62, (1,), generator=generator, device="cuda"))
        return x_TD * kept(x_TD.shape[0], x_TD.shape[1], noise, next(sites), probability) / (1 - probability)

    monkeypatch.setattr("tunesmith.model.lora.F", SimpleNamespace(dropout=drop, linear=F.linear))


@pytest.mark.usefixtures("_same_masks")
@pytest.mark.parametrize("method", [name for name in METHODS if "fp8" not in name])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_equals_the_eager_blocks(family: str, method: str, tiny_model_dir: Make) -> None:
    decoder = _decoder(tiny_model_dir(family, **LARGE), method, torch.float32)
    assert decoder.num_fused_blocks == 2
    found = _results(decoder, [_pack(RAGGED)])
    decoder.is_fused = False
    _assert_close(_results(decoder, [_pack(RAGGED)]), found, 1e-4)


@pytest.mark.parametrize("checkpointing", ["none", "block", "selective", "selective-qkv"])
@pytest.mark.parametrize("method", METHODS)
def test_graphs_repeat_what_launches_do(method: str, checkpointing: Any, tiny_model_dir: Make) -> None:
    """Seeds drawn outside a recording reach it: every micro-batch has masks of its own, the same both ways."""
    decoder = _decoder(tiny_model_dir("qwen3", **LARGE), method, torch.bfloat16)
    decoder.checkpointing = checkpointing
    packs = [_pack(EVEN, 0), _pack(RAGGED, 1), _pack(EVEN, 0)]
    expected = _results(decoder, packs)
    assert torch.equal(expected["hidden 0"], expected["hidden 2"]) == ("dropout" not in method)
    decoder.captured = CapturedBlocks()
    for _ in range(2):
        # fp8 products round differently with every difference before them.
        _assert_close(expected, _results(decoder, packs), 8e-2 if "fp8" in method else 2e-2)
        assert decoder.captured.refused is None
    assert decoder.captured.num_graphs >= 1


@pytest.mark.parametrize("method", ["dropout", "dora"])
def test_offloaded_and_tiled(method: str, tiny_model_dir: Make) -> None:
    decoder = _decoder(tiny_model_dir("qwen3", num_hidden_layers=3, **LARGE), method, torch.bfloat16)
    packs = [_pack(EVEN), _pack(RAGGED, 1)]
    expected = _results(decoder, packs)
    decoder.checkpointing, decoder.mlp_tile_tokens = "offload", 48
    _assert_close(expected, _results(decoder, packs), 2e-2)


@pytest.mark.parametrize("method", ["dropout", "dora"])
def test_a_recording_learns(method: str, tiny_model_dir: Make) -> None:
    """Masters, magnitudes and norms written between replays are read by the next one; with and without a recording."""
    losses = {}
    for is_captured in (False, True):
        decoder = _decoder(tiny_model_dir("qwen3", **LARGE), method, torch.bfloat16)
        decoder.captured = CapturedBlocks() if is_captured else None
        optimizer = torch.optim.AdamW([p for p in decoder.parameters() if p.requires_grad], lr=1e-2, fused=True)
        torch.manual_seed(SEED)
        losses[is_captured] = [_step(decoder, optimizer) for _ in range(10)]
    assert losses[True] == pytest.approx(losses[False], rel=2e-2)
    assert losses[True][-1] < 0.9 * losses[True][0]


def _step(decoder: Decoder, optimizer: torch.optim.Optimizer) -> float:
    hidden = decoder.hidden(_pack(EVEN)).float()
    target = torch.randn(hidden.shape[1], generator=torch.Generator().manual_seed(7)).to(hidden.device)
    loss = (hidden - target).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (17, 200), (3, 97), (300, 3584), (65, 18944)])
def test_the_kernel_is_the_reference(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(shape, device="cuda").to(dtype)
    noise = Noise(torch.tensor([2**61 + 12345], device="cuda"), 7)
    for probability in (0.05, 0.5, 0.9):
        mine, truth = dropout(x, noise, 3, probability), dropout_reference(x, noise, 3, probability)
        assert torch.equal(mine == 0, truth == 0)
        assert torch.equal(mine, truth)
        out = torch.randn_like(x)
        expected = out.clone()
        add_dropout_(out, x, noise, 3, probability)
        add_dropout_reference_(expected, x, noise, 3, probability)
        limit = torch.finfo(dtype).eps
        torch.testing.assert_close(out, expected, rtol=limit, atol=limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (17, 200), (513, 7), (8192, 3584)])
def test_inner_products_of_columns(shape: tuple[int, int], dtype: torch.dtype) -> None:
    left, right = (torch.randn(shape, device="cuda").to(dtype) for _ in range(2))
    found = column_dot(left, right)
    torch.testing.assert_close(found, column_dot_reference(left, right), rtol=1e-4, atol=1e-3)
    assert torch.equal(found, column_dot(left, right))


def test_dropout_has_most_of_a_copys_bandwidth() -> None:
    """Reading and writing [8192, 18944] against a copy of the same bytes."""
    x = torch.randn(8192, 18944, device="cuda", dtype=torch.bfloat16)
    noise = Noise(torch.tensor([1], device="cuda"))
    out = torch.empty_like(x)
    assert _milliseconds(lambda: out.copy_(x)) > 0.5 * _milliseconds(lambda: dropout(x, noise, 0, 0.1))


def _milliseconds(function: Callable[[], object]) -> float:
    times = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times[2:])[5]


@pytest.mark.parametrize("method", ["dropout", "dora", "lora"])
def test_less_is_held_than_by_the_eager_blocks(method: str, tiny_model_dir: Make) -> None:
    decoder = _decoder(tiny_model_dir("qwen3", **LARGE), method, torch.bfloat16)
    held, pack = {}, _pack([2048] * 4)
    for decoder.is_fused in (True, False):
        _results(decoder, [pack])
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        hidden = decoder.hidden(pack)
        held[decoder.is_fused] = torch.cuda.memory_allocated() - before
        del hidden
    assert held[True] < 0.7 * held[False]
