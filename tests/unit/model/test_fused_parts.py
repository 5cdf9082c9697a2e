"""SwiGLU's gradient that sums up the adapters': the gradients of launches of their own, where it is asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.checkpoint.load import load_decoder
from tunesmith.kernels import swiglu as swiglu_module
from tunesmith.kernels import swiglu_low_rank as low_rank_module
from tunesmith.kernels.swiglu_low_rank_grads import swiglu_low_rank_grads
from tunesmith.model import fused_parts
from tunesmith.model.decoder import Decoder
from tunesmith.model.methods import apply_method
from tunesmith.model.packed import pack_documents
from tunesmith.recipe.schema import MethodSection

Make = Callable[..., Path]
METHODS: dict[str, dict[str, Any]] = {
    "fp8": {"kind": "lora", "rank": 4, "base": "fp8"},
    "nf4": {"kind": "qlora", "rank": 4, "fp8_compute": True},
    "full": {"kind": "full", "fp8_compute": True},
    "plain": {"kind": "lora", "rank": 4},
    "dora": {"kind": "lora", "rank": 4, "dora": True, "base": "fp8"},
    "attention": {"kind": "lora", "rank": 4, "targets": ["q_proj", "down_proj"], "base": "fp8"},
}


@pytest.fixture(autouse=True)
def _by_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 a CPU goes a shorter way with other bits; these tests are about the bits of the references."""
    for module in (swiglu_module, low_rank_module):
        monkeypatch.setattr(module, "in_float32_on_cpu", lambda *_: False)


@pytest.fixture
def asks_kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From now on the blocks ask for what they ask for on a GPU; the kernels' references answer."""
    return lambda: monkeypatch.setattr(fused_parts, "use_kernel", lambda _: True)


def gradients(directory: Path, method: str, checkpointing: Any = "none") -> tuple[Tensor, dict[str, Tensor]]:
    section = MethodSection(**METHODS[method])
    decoder: Decoder = load_decoder(directory, quantize=section.quantisation).train()
    apply_method(decoder, section, seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith(".B"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    decoder.is_fused, decoder.checkpointing = True, checkpointing
    hidden = decoder.hidden(pack_documents([[1, 2, 3, 4, 5], [6, 7], [8, 9, 10] * 3]))
    (hidden.float() * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    return hidden.detach(), {n: p.grad for n, p in decoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", ["none", "selective"])
@pytest.mark.parametrize("method", METHODS)
def test_summed_adapter_gradients_are_those_of_their_products(
    method: str, checkpointing: str, tiny_model_dir: Make, asks_kernels: Callable[[], None]
) -> None:
    directory = tiny_model_dir("qwen2")
    hidden, grads = gradients(directory, method, checkpointing)
    asks_kernels()
    again, again_grads = gradients(directory, method, checkpointing)
    assert torch.equal(hidden, again)
    assert grads.keys() == again_grads.keys()
    for name in grads:
        torch.testing.assert_close(again_grads[name], grads[name], rtol=1e-5, atol=1e-5)


def test_the_kernel_that_sums_is_asked(
    tiny_model_dir: Make, asks_kernels: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(*arguments: Any) -> tuple[Tensor, Tensor]:
        calls.append(len(arguments))
        return swiglu_low_rank_grads(*arguments)

    monkeypatch.setattr(fused_parts, "swiglu_low_rank_grads", counted)
    directory = tiny_model_dir("qwen2")
    gradients(directory, "plain")
    assert not calls  # a CPU has less work without
    asks_kernels()
    for method, expected in (("plain", True), ("fp8", True), ("full", False), ("dora", False), ("attention", False)):
        calls.clear()
        gradients(directory, method)
        assert bool(calls) == expected, method
