"""The MLP in tiles of tokens against the whole: hidden states and every gradient, up to the order of the sums."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tunesmith.checkpoint.load import load_decoder
from tunesmith.model.decoder import Decoder
from tunesmith.model.fused import norm_mlp
from tunesmith.model.layers import RMSNorm
from tunesmith.model.methods import apply_method
from tunesmith.model.packed import pack_documents
from tunesmith.model.tiled import tiled_mlp
from tunesmith.recipe.schema import MethodSection

Make = Callable[..., Path]
DOCUMENTS = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10] * 7, [3]]
NUM_TOKENS = 29
METHODS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "lora": {"kind": "lora", "rank": 4},
    "qlora": {"kind": "qlora", "rank": 4},
    "up only": {"kind": "lora", "rank": 4, "targets": ["up_proj"]},
    "attention": {"kind": "lora", "rank": 4, "targets": ["q_proj"]},
    "freeze": {"kind": "freeze", "trainable": ["last:1"]},
}


def _decoder(directory: Path, method: str) -> Decoder:
    quantize: Any = "nf4-double" if method == "qlora" else None
    decoder = load_decoder(directory, quantize=quantize).train()
    apply_method(decoder, MethodSection(**METHODS[method]), seed=3)
    decoder.is_fused = True
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith(".B"):
                parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
    return decoder


def _gradients(decoder: Decoder, tile_tokens: int | None) -> tuple[Tensor, dict[str, Tensor]]:
    decoder.mlp_tile_tokens = tile_tokens
    decoder.zero_grad()
    hidden = decoder.hidden(pack_documents(DOCUMENTS))
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    (hidden.float() * weights).sum().backward()
    return hidden.detach(), {n: p.grad.clone() for n, p in decoder.named_parameters() if p.grad is not None}


def _assert_close(expected: dict[str, Tensor], grads: dict[str, Tensor], tolerance: float) -> None:
    assert expected.keys() == grads.keys()
    for name, gradient in expected.items():
        assert grads[name].dtype == gradient.dtype
        error = (grads[name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert float(error) < tolerance, f"{name}: {float(error):.1e}"


@pytest.mark.parametrize("tile_tokens", [1, 7, 28, 29, 64])
@pytest.mark.parametrize("method", METHODS)
def test_tiles_change_no_gradient_of_an_mlp(method: str, tile_tokens: int, tiny_model_dir: Make) -> None:
    decoder = _decoder(tiny_model_dir("qwen2"), method)
    block = decoder._fused.of(decoder.blocks, torch.float32)[-1]
    decoder._fused.refresh()
    norm = block.block.mlp_norm
    assert isinstance(norm, RMSNorm)
    assert block.up is not None
    assert block.down is not None
    named = {name: p for name, p in decoder.blocks[-1].named_parameters() if "mlp" in name and p.requires_grad}
    generator = torch.Generator().manual_seed(1)
    x, g = (torch.randn(NUM_TOKENS, 32, generator=generator) for _ in range(2))
    results = []
    for tiles in (None, tile_tokens):
        source = x.clone().requires_grad_()
        if tiles is None:
            out = norm_mlp(source, norm, block.up, block.down, False)
        else:
            out = tiled_mlp(source, norm, block.up, block.down, tiles)
        found = torch.autograd.grad(out, [source, *named.values()], g)
        results.append({"out": out.detach(), **dict(zip(["x", *named], found, strict=True))})
    _assert_close(results[0], results[1], 1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_tiles_change_no_gradient_of_a_model(method: str, tiny_model_dir: Make) -> None:
    """Attention in between makes more of a difference in rounding than the MLP itself does."""
    decoder = _decoder(tiny_model_dir("qwen2"), method)
    hidden, expected = _gradients(decoder, None)
    tiled, grads = _gradients(decoder, 7)
    torch.testing.assert_close(tiled, hidden, rtol=1e-5, atol=1e-5)
    _assert_close(expected, grads, 2e-5)


def test_adapters_are_summed_in_float32(tiny_model_dir: Make) -> None:
    """In bfloat16, many tiles of one token are as close to float32's gradients as one tile of all."""
    decoder = _decoder(tiny_model_dir("llama"), "lora")
    _, exact = _gradients(decoder, None)
    decoder.compute_dtype = torch.bfloat16
    errors = {}
    for tile_tokens in (None, 1):
        _, grads = _gradients(decoder, tile_tokens)
        assert all(gradient.dtype == torch.float32 for gradient in grads.values())
        errors[tile_tokens] = sum(float((grads[n] - exact[n]).norm() / exact[n].norm()) for n in exact)
    assert errors[1] < 1.1 * errors[None]


@pytest.mark.parametrize("checkpointing", ["none", "block", "selective"])
def test_the_widest_activation_never_exists_whole(
    checkpointing: Any, tiny_model_dir: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in the forward nor in the backward pass: seen at the product that makes it."""
    decoder = _decoder(tiny_model_dir("llama"), "lora")
    decoder.checkpointing = checkpointing
    rows: list[int] = []
    for block in decoder._fused.of(decoder.blocks, torch.float32):
        assert block.up is not None
        _watch(monkeypatch, block.up, rows)
    _gradients(decoder, 8)
    assert max(rows) == 8
    assert sum(rows) >= 2 * 2 * NUM_TOKENS  # two blocks, forward and again


def _watch(monkeypatch: pytest.MonkeyPatch, projection: Any, rows: list[int]) -> None:
    compute = projection.forward_apart

    def watched(x_TD: Tensor, *rest: Any) -> Any:
        rows.append(x_TD.shape[0])
        return compute(x_TD, *rest)

    monkeypatch.setattr(projection, "forward_apart", watched)


def test_tiles_hold_what_selective_checkpointing_does(tiny_model_dir: Make) -> None:
    """Bytes that wait for the backward pass, whatever the number of tiles."""
    decoder = _decoder(tiny_model_dir("llama"), "lora")
    held = {}
    for tile_tokens in (None, 1, 8):
        decoder.checkpointing = "selective" if tile_tokens is None else "none"
        decoder.mlp_tile_tokens = tile_tokens
        held[tile_tokens] = _held_bytes(decoder)
    assert held[None] == held[1] == held[8]


def _held_bytes(decoder: Decoder) -> int:
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = decoder.hidden(pack_documents(DOCUMENTS))
    assert hidden.requires_grad
    return sum(storages.values())
