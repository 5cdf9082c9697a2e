"""The written-out blocks against the eager ones: hidden states and every gradient, for every method and family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.checkpoint.load import load_decoder
from tunesmith.model.decoder import Decoder
from tunesmith.model.lora import Adapter
from tunesmith.model.methods import apply_method
from tunesmith.model.packed import pack_documents
from tunesmith.recipe.schema import MethodSection

Make = Callable[..., Path]
DOCUMENTS = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10] * 7, [3]]
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gpt2"]
METHODS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "lora": {"kind": "lora", "rank": 4},
    "rslora": {"kind": "lora", "rank": 4, "rslora": True},
    "attention": {"kind": "lora", "rank": 4, "targets": ["q_proj", "v_proj"]},
    "dora": {"kind": "lora", "rank": 4, "dora": True},
    "qlora": {"kind": "qlora", "rank": 4},
    "freeze": {"kind": "freeze", "trainable": ["last:1"]},
}


def _decoder(directory: Path, method: dict[str, Any]) -> Decoder:
    quantize = "nf4-double" if method["kind"] == "qlora" else None
    decoder = load_decoder(directory, quantize=quantize).train()
    apply_method(decoder, MethodSection(**method), seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith(".B"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return decoder


def _gradients(decoder: Decoder, is_fused: bool) -> tuple[Tensor, dict[str, Tensor]]:
    decoder.is_fused = is_fused
    decoder.zero_grad()
    hidden = decoder.hidden(pack_documents(DOCUMENTS))
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    (hidden.float() * weights).sum().backward()
    return hidden.detach(), {n: p.grad.clone() for n, p in decoder.named_parameters() if p.grad is not None}


def _assert_equal(eager: dict[str, Tensor], fused: dict[str, Tensor], tolerance: float) -> None:
    assert eager.keys() == fused.keys()
    for name, expected in eager.items():
        assert fused[name].dtype == expected.dtype
        error = (fused[name] - expected).norm() / expected.norm().clamp(min=1e-6)
        assert float(error) < tolerance, f"{name}: {float(error):.2e}"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_gradients_are_the_eager_ones(family: str, method: str, tiny_model_dir: Make) -> None:
    if family == "gpt2" and method == "attention":
        pytest.skip("GPT-2's query, key and value are one projection")
    decoder = _decoder(tiny_model_dir(family), METHODS[method])
    hidden, grads = _gradients(decoder, False)
    fused_hidden, fused_grads = _gradients(decoder, True)
    torch.testing.assert_close(fused_hidden, hidden, rtol=1e-5, atol=1e-5)
    _assert_equal(grads, fused_grads, 2e-5)


@pytest.mark.parametrize("kind", ["block", "selective", "selective-qkv"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe"])
def test_checkpointing_changes_no_gradient(family: str, kind: Any, tiny_model_dir: Make) -> None:
    decoder = _decoder(tiny_model_dir(family), METHODS["lora"])
    hidden, grads = _gradients(decoder, True)
    decoder.checkpointing = kind
    again, again_grads = _gradients(decoder, True)
    if family == "qwen3_moe" and kind != "block":  # eager blocks stand in
        torch.testing.assert_close(again, hidden, rtol=1e-5, atol=1e-5)
        _assert_equal(grads, again_grads, 2e-5)
        return
    assert torch.equal(hidden, again)
    assert all(torch.equal(grads[name], again_grads[name]) for name in grads)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_query_key_and_value_made_again_are_what_they_were(method: str, tiny_model_dir: Make) -> None:
    decoder = _decoder(tiny_model_dir("qwen3"), METHODS[method])
    hidden, grads = _gradients(decoder, True)
    decoder.checkpointing = "selective-qkv"
    again, again_grads = _gradients(decoder, True)
    assert torch.equal(hidden, again)
    assert all(torch.equal(grads[name], again_grads[name]) for name in grads)


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("kind", ["block", "selective", "selective-qkv"])
def test_the_last_blocks_can_be_spared(kind: Any, is_fused: bool, tiny_model_dir: Make) -> None:
    decoder = _decoder(tiny_model_dir("qwen2", num_hidden_layers=3), METHODS["lora"])
    _, grads = _gradients(decoder, is_fused)
    decoder.checkpointing = kind
    held = []
    for decoder.skip_last in range(4):
        _, again = _gradients(decoder, is_fused)
        _assert_equal(grads, again, 1e-6)
        held.append(_held_bytes(decoder, is_fused))
    if is_fused or kind == "block":
        assert held == sorted(held)
        assert held[0] < held[1] < held[2]


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_bfloat16_stays_close(method: str, tiny_model_dir: Make) -> None:
    decoder = _decoder(tiny_model_dir("qwen2"), METHODS[method])
    _, exact = _gradients(decoder, False)
    decoder.compute_dtype = torch.bfloat16
    _, eager = _gradients(decoder, False)
    _, fused = _gradients(decoder, True)
    for name, expected in exact.items():
        norm = expected.norm().clamp(min=1e-6)
        assert (fused[name] - expected).norm() / norm < 1.5 * (eager[name] - expected).norm() / norm + 1e-2, name


@pytest.mark.parametrize("is_fused", [True, False])
def test_adapters_written_by_the_optimiser_are_seen(is_fused: bool, tiny_model_dir: Make) -> None:
    """torch's fused optimisers write parameters without counting up their version: a copy must not go by it."""
    decoder = _decoder(tiny_model_dir("llama"), METHODS["lora"])
    trained = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, fused=is_fused)
    before, _ = _gradients(decoder, True)
    optimizer.step()
    hidden, grads = _gradients(decoder, True)
    expected, expected_grads = _gradients(decoder, False)
    assert (hidden - before).norm() > 1e-2 * before.norm()
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
    _assert_equal(expected_grads, grads, 2e-5)


def test_a_method_applied_later_is_seen(tiny_model_dir: Make) -> None:
    decoder = load_decoder(tiny_model_dir("llama")).train()
    _gradients(decoder, True)
    apply_method(decoder, MethodSection(kind="lora", rank=4), seed=0)
    _, grads = _gradients(decoder, True)
    assert grads
    assert all(".adapters." in name for name in grads)


def test_adapters_exchanged_in_place_are_seen(tiny_model_dir: Make) -> None:
    decoder = _decoder(tiny_model_dir("llama"), METHODS["lora"])
    _gradients(decoder, True)
    for module in decoder.modules():
        if isinstance(module, Adapter):
            module.A = torch.nn.Parameter(2 * module.A.detach())
    hidden, _ = _gradients(decoder, True)
    torch.testing.assert_close(hidden, _gradients(decoder, False)[0], rtol=1e-5, atol=1e-5)


def test_less_is_held_than_by_the_eager_blocks(tiny_model_dir: Make) -> None:
    """Bytes that wait for the backward pass."""
    decoder = _decoder(tiny_model_dir("llama"), METHODS["lora"])
    held = {"eager": _held_bytes(decoder, False), "fused": _held_bytes(decoder, True)}
    kinds: tuple[Any, ...] = ("selective", "selective-qkv")
    for decoder.checkpointing in kinds:
        held[decoder.checkpointing] = _held_bytes(decoder, True)
    assert held["selective"] < held["fused"] < 0.7 * held["eager"]
    config = decoder.config
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    qkv = 4 * len(list(range(1, 50)) * 2) * 4 * heads * config.head_dim * config.num_hidden_layers
    assert held["selective"] - held["selective-qkv"] >= qkv


def _held_bytes(decoder: Decoder, is_fused: bool) -> int:
    decoder.is_fused = is_fused
    weights = {p.data_ptr() for p in decoder.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = decoder.hidden(pack_documents([list(range(1, 50)) * 2] * 4))
    assert hidden.requires_grad
    return sum(storages.values())
