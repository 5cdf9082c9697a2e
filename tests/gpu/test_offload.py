"""Activations on the host, with real copies: gradients, memory, graphs, and no wait of the host for the device."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.checkpoint.load import load_decoder
from tunesmith.model.captured import CapturedBlocks
from tunesmith.model.decoder import Decoder
from tunesmith.model.methods import apply_method
from tunesmith.model.offload import Offloader
from tunesmith.model.packed import PackedTokens, pack_documents
from tunesmith.model.transfer import CudaTransfer
from tunesmith.recipe.schema import MethodSection

pytestmark = pytest.mark.gpu
Guard = Callable[[], AbstractContextManager[None]]
Make = Callable[..., Path]
NUM_BLOCKS = 6
EVEN = [256] * 4
RAGGED = [100, 28, 1, 127, 300, 468]
LARGE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": NUM_BLOCKS,
    "max_position_embeddings": 8192,
}


def _decoder(directory: Path, kind: str, checkpointing: Any, *, is_captured: bool, least_bytes: int = 1) -> Decoder:
    quantize: Any = "nf4-double" if kind == "qlora" else None
    decoder = load_decoder(directory, device="cuda", dtype=torch.bfloat16, quantize=quantize).train()
    method = {"kind": kind} if kind == "full" else {"kind": kind, "rank": 4}
    apply_method(decoder, MethodSection(**method), seed=3)
    decoder.is_fused = True
    decoder.checkpointing = checkpointing
    if checkpointing == "offload":
        decoder.offloader = Offloader(CudaTransfer(torch.device("cuda", 0)), least_bytes)
    decoder.captured = CapturedBlocks() if is_captured else None
    return decoder


def _pack(lengths: list[int], seed: int) -> PackedTokens:
    generator = torch.Generator().manual_seed(seed)
    return pack_documents([torch.randint(1, 60, (n,), generator=generator).tolist() for n in lengths], "cuda")


def _gradients(decoder: Decoder, packs: list[PackedTokens]) -> dict[str, Tensor]:
    decoder.zero_grad(set_to_none=True)
    for pack in packs:
        decoder.hidden(pack).float().square().mean().backward()
    return {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}


def _assert_close(expected: dict[str, Tensor], got: dict[str, Tensor]) -> None:
    assert expected.keys() == got.keys()
    for name, gradient in expected.items():
        error = (got[name].float() - gradient.float()).norm() / gradient.float().norm().clamp(min=1e-6)
        assert float(error) < 2e-2, f"{name}: {float(error):.1e}"


def _offloader(decoder: Decoder) -> Offloader:
    assert decoder.offloader is not None
    return decoder.offloader


@pytest.mark.parametrize("is_captured", [False, True])
@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
def test_gradients_are_those_of_selective(kind: str, is_captured: bool, tiny_model_dir: Make) -> None:
    """Over two shapes, accumulated, three times: host and device memory are used again."""
    directory = tiny_model_dir("qwen2", **LARGE)
    packs = [_pack(EVEN, 0), _pack(RAGGED, 1), _pack(EVEN, 2)]
    expected = _gradients(_decoder(directory, kind, "selective", is_captured=False), packs)
    decoder = _decoder(directory, kind, "offload", is_captured=is_captured)
    totals = []
    for _ in range(3):
        _assert_close(expected, _gradients(decoder, packs))
        totals.append(_offloader(decoder).host.total_bytes)
    assert totals[0] == totals[-1] > 0
    assert _offloader(decoder).host.leased_bytes == 0
    if decoder.captured is not None:
        assert decoder.captured.refused is None
        assert decoder.captured.num_graphs == 2


@pytest.mark.parametrize("is_captured", [False, True])
def test_the_device_holds_two_blocks_worth_at_most(is_captured: bool, tiny_model_dir: Make) -> None:
    """Against selective checkpointing, which holds what all blocks save; without graphs, which keep their memory."""
    directory = tiny_model_dir("llama", **LARGE)
    pack = _pack([2048] * 4, 0)
    peaks = {}
    for kind in ("selective", "offload"):
        decoder = _decoder(directory, "lora", kind, is_captured=is_captured, least_bytes=1 << 20)
        _gradients(decoder, [pack])
        torch.cuda.synchronize()
        peaks[kind] = _held(decoder, pack)
        if kind == "offload":
            a_block = _offloader(decoder).host.total_bytes / (NUM_BLOCKS - 1)
        del decoder
        gc.collect()
    saved = peaks["selective"] - peaks["offload"]
    # What a graph keeps is reserved in segments, which fit less tightly.
    assert saved > (0.5 if is_captured else 0.8) * (NUM_BLOCKS - 3) * a_block, (peaks, a_block)


def _held(decoder: Decoder, pack: PackedTokens) -> int:
    """Bytes: at the peak of a step above what is held before it; with graphs, all that is reserved."""
    gc.collect()
    torch.cuda.empty_cache()
    if decoder.captured is not None:
        return torch.cuda.memory_reserved()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _gradients(decoder, [pack])
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("is_captured", [False, True])
def test_nothing_is_read_before_it_is_there(is_captured: bool, tiny_model_dir: Make) -> None:
    """Many passes queued without a wait, with memory that other tensors are written to in between."""
    directory = tiny_model_dir("llama", **LARGE)
    pack = _pack([2048] * 4, 0)
    expected = _gradients(_decoder(directory, "lora", "selective", is_captured=False), [pack])
    decoder = _decoder(directory, "lora", "offload", is_captured=is_captured)
    _gradients(decoder, [pack])
    found = []
    for _ in range(10):
        found.append(_gradients(decoder, [pack]))
        for size in (1 << 20, 1 << 23, 1 << 24):
            torch.full((size,), float("nan"), device="cuda")
    for grads in found:
        _assert_close(expected, grads)


def test_the_host_never_waits(tiny_model_dir: Make, no_waiting: Guard) -> None:
    decoder = _decoder(tiny_model_dir("llama", **LARGE), "lora", "offload", is_captured=False)
    pack = _pack(EVEN, 0)
    _gradients(decoder, [pack])
    with no_waiting():
        _gradients(decoder, [pack])


def test_a_pass_that_breaks_off_leaves_nothing(tiny_model_dir: Make) -> None:
    decoder = _decoder(tiny_model_dir("llama", **LARGE), "lora", "offload", is_captured=False)
    pack = _pack(EVEN, 0)
    expected = _gradients(decoder, [pack])
    hidden = decoder.hidden(pack)
    assert _offloader(decoder).host.leased_bytes > 0
    del hidden
    assert _offloader(decoder).host.leased_bytes == 0
    _assert_close(expected, _gradients(decoder, [pack]))


def test_host_memory_is_pinned_and_given_back() -> None:
    """The same memory can be pinned anew, which the driver refuses for what is still pinned."""
    transfer = CudaTransfer(torch.device("cuda", 0))
    source = torch.arange(1 << 21, device="cuda", dtype=torch.int32).view(torch.uint8)
    for _ in range(5):
        buffer = transfer.allocate(source.numel())
        assert buffer.is_pinned()
        transfer.wait(transfer.copy([(buffer, source)]))
        torch.cuda.synchronize()
        assert torch.equal(buffer, source.cpu())
        del buffer


@pytest.mark.parametrize("is_captured", [False, True])
@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
def test_tiles_of_the_mlp_change_no_gradient(kind: str, is_captured: bool, tiny_model_dir: Make) -> None:
    directory = tiny_model_dir("qwen2", **LARGE)
    packs = [_pack(EVEN, 0), _pack(RAGGED, 1)]
    expected = _gradients(_decoder(directory, kind, "none", is_captured=False), packs)
    for checkpointing in ("none", "block", "offload"):
        decoder = _decoder(directory, kind, checkpointing, is_captured=is_captured)
        decoder.mlp_tile_tokens = 300
        _assert_close(expected, _gradients(decoder, packs))
        if decoder.captured is not None:
            assert decoder.captured.refused is None
