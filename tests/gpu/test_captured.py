"""The blocks as CUDA graphs against the same blocks launched one by one: losses, gradients, packings, accumulation."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.checkpoint.load import load_decoder
from tunesmith.model.captured import CapturedBlocks
from tunesmith.model.decoder import Decoder
from tunesmith.model.methods import apply_method
from tunesmith.model.packed import PackedTokens, pack_documents
from tunesmith.recipe.schema import MethodSection

pytestmark = pytest.mark.gpu
Make = Callable[..., Path]
EVEN = [64, 64, 64, 64]
RAGGED = [[100, 28, 1, 127], [30, 98, 128], [100, 100, 56], [5, 5, 6, 112, 128]]


def _decoder(directory: Path, kind: str, checkpointing: Any) -> Decoder:
    quantize: Any = "nf4-double" if kind == "qlora" else None
    decoder = load_decoder(directory, device="cuda", dtype=torch.bfloat16, quantize=quantize).train()
    method = {"kind": kind} if kind == "full" else {"kind": kind, "rank": 4}
    apply_method(decoder, MethodSection(**method), seed=3)
    decoder.is_fused = True
    decoder.checkpointing = checkpointing
    return decoder


def _pack(lengths: list[int], seed: int) -> PackedTokens:
    generator = torch.Generator().manual_seed(seed)
    return pack_documents([torch.randint(1, 60, (n,), generator=generator).tolist() for n in lengths], "cuda")


def _accumulated(decoder: Decoder, packs: list[PackedTokens]) -> tuple[list[Tensor], dict[str, Tensor]]:
    decoder.zero_grad(set_to_none=True)
    outs = []
    for pack in packs:
        hidden = decoder.hidden(pack)
        hidden.float().square().sum().backward()
        outs.append(hidden.detach().clone())
    return outs, {n: p.grad.clone() for n, p in decoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", ["none", "block", "selective", "selective-qkv"])
@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
def test_graphs_repeat_what_launches_do(kind: str, checkpointing: str, tiny_model_dir: Make) -> None:
    """Two models of the same weights."""
    directory = tiny_model_dir("qwen2", hidden_size=64, num_attention_heads=4)
    packs = [_pack(EVEN, 0), *(_pack(lengths, i) for i, lengths in enumerate(RAGGED)), _pack(EVEN, 9)]
    outs, grads = _accumulated(_decoder(directory, kind, checkpointing), packs)
    decoder = _decoder(directory, kind, checkpointing)
    decoder.captured = CapturedBlocks()
    for _ in range(2):
        again, again_grads = _accumulated(decoder, packs)
        assert decoder.captured.refused is None
        for out, expected in zip(again, outs, strict=True):
            torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
        assert grads.keys() == again_grads.keys()
        for name, expected in grads.items():
            error = (again_grads[name].float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-6)
            assert float(error) < 2e-2, f"{name}: {float(error):.1e}"
    assert decoder.captured.num_graphs >= 1


def test_what_is_recorded_may_have_gone_backward_before(tiny_model_dir: Make) -> None:
    """On the default stream, in graphs that are still held: eager ones, and ones with a recording in them."""
    decoder = _decoder(tiny_model_dir("qwen2", hidden_size=64, num_attention_heads=4), "full", "none")
    held = [decoder.hidden(_pack(EVEN, 0)), decoder.hidden(_pack(EVEN, 0))]
    held[0].float().square().sum().backward()
    expected = {n: p.grad.clone() for n, p in decoder.named_parameters() if p.grad is not None}
    stream = torch.cuda.current_stream()
    decoder.captured = CapturedBlocks()
    for lengths in (EVEN, RAGGED[0], EVEN):
        decoder.zero_grad(set_to_none=True)
        held.append(decoder.hidden(_pack(lengths, 0)))
        held[-1].float().square().sum().backward()
        assert decoder.captured.refused is None
        assert torch.cuda.current_stream() == stream
    grads = {n: p.grad.clone() for n, p in decoder.named_parameters() if p.grad is not None}
    decoder.zero_grad(set_to_none=True)
    held[1].float().square().sum().backward()  # built before anything was recorded
    late = {n: p.grad for n, p in decoder.named_parameters() if p.grad is not None}
    for name, truth in expected.items():
        for found in (grads[name], late[name]):
            error = (found.float() - truth.float()).norm() / truth.float().norm().clamp(min=1e-6)
            assert float(error) < 2e-2, f"{name}: {float(error):.1e}"


def test_a_recording_that_fails_leaves_everything_usable(tiny_model_dir: Make) -> None:
    """An operator that asks the device for a number; the next recording of another model works."""
    weight = torch.nn.Parameter(torch.ones(4, device="cuda"))
    stream, captured = torch.cuda.current_stream(), CapturedBlocks()

    def run(hidden: Tensor, _pack: PackedTokens, _seed: Tensor | None) -> Tensor:
        return hidden * weight * float(hidden.sum())

    out = captured(run, torch.ones(256, 4, device="cuda"), _pack(EVEN, 0), "none", [weight])
    assert captured.refused is not None
    assert "previous error" not in captured.refused
    assert torch.cuda.current_stream() == stream
    out.sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [256.0 * 1024] * 4
    decoder = _decoder(tiny_model_dir("llama"), "lora", "none")
    decoder.captured = CapturedBlocks()
    decoder.hidden(_pack(EVEN, 0)).sum().backward()
    assert decoder.captured.refused is None


def test_recordings_leave_nothing_behind(tiny_model_dir: Make) -> None:
    """Neither their memory, once they are gone, nor a workspace of cuBLAS for another stream each time."""
    reserved = []
    for _ in range(3):
        decoder = _decoder(tiny_model_dir("llama"), "lora", "none")
        decoder.captured = CapturedBlocks()
        _accumulated(decoder, [_pack(EVEN, 0), _pack(RAGGED[0], 1)])
        assert decoder.captured.num_graphs == 2
        del decoder
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[2] <= reserved[1]


def test_a_training_loop_learns_the_same(tiny_model_dir: Make) -> None:
    """Masters written by the optimiser between replays are read by the next one."""
    losses = {}
    for is_captured in (False, True):
        decoder = _decoder(tiny_model_dir("llama"), "lora", "none")
        decoder.captured = CapturedBlocks() if is_captured else None
        if decoder.captured is not None:
            decoder.captured.exclusive = True
        optimizer = torch.optim.AdamW([p for p in decoder.parameters() if p.requires_grad], lr=1e-2, fused=True)
        losses[is_captured] = [_step(decoder, optimizer, i) for i in range(8)]
    assert losses[True] == pytest.approx(losses[False], rel=1e-2)
    assert losses[True][-1] < 0.9 * losses[True][0]


def _step(decoder: Decoder, optimizer: torch.optim.Optimizer, number: int) -> float:
    pack = _pack(RAGGED[number % len(RAGGED)], number)
    hidden = decoder.hidden(pack).float()
    target = torch.randn(hidden.shape[1], generator=torch.Generator().manual_seed(7)).to(hidden.device)
    loss = (hidden - target).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss)


def test_two_micro_batches_in_flight_are_refused(tiny_model_dir: Make) -> None:
    decoder = _decoder(tiny_model_dir("llama"), "lora", "none")
    decoder.captured = CapturedBlocks()
    first = decoder.hidden(_pack(EVEN, 0))
    decoder.hidden(_pack(EVEN, 1))
    with pytest.raises(RuntimeError, match="go backward through it before the next goes forward"):
        first.sum().backward()
