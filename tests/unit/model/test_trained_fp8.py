"""Linears trained with products in fp8: near the exact ones, eager and written out alike, names unchanged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from tunesmith.arch import config_from_dict
from tunesmith.checkpoint.load import load_model
from tunesmith.errors import UnsupportedModelError
from tunesmith.kernels.fp8 import quantize_rows_fp8
from tunesmith.model.decoder import Decoder
from tunesmith.model.layers import Linear
from tunesmith.model.methods import apply_method
from tunesmith.model.packed import pack_documents
from tunesmith.model.quant import set_compute
from tunesmith.model.trained_fp8 import TrainedFp8Linear, train_in_fp8
from tunesmith.recipe.schema import MethodSection

TINY: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
MIXTRAL = TINY | {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(bias: bool = True, dtype: torch.dtype = torch.float32) -> Linear:
    torch.manual_seed(0)
    made = Linear(48, {"gate_proj": 72, "up_proj": 72}, bias)
    nn.init.normal_(made.weight)
    if made.bias is not None:
        nn.init.normal_(made.bias)
    return made.to(dtype)


def decoder(config: dict[str, Any] = TINY) -> Decoder:
    torch.manual_seed(0)
    made = Decoder(config_from_dict(config))
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made


def gradients(model: Decoder) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    hidden = model.train().hidden(pack_documents([[1, 2, 3, 4, 5, 6, 7], [9, 8, 7, 6]]))
    (hidden * torch.linspace(-1, 1, hidden.shape[1])).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def rounded(x: Tensor) -> Tensor:
    codes, scale = quantize_rows_fp8(x)
    return codes.float() * scale


@pytest.mark.parametrize("bias", [True, False])
def test_the_three_products_are_those_of_the_rounded_operands(bias: bool) -> None:
    """Tokens and rows that are no multiple of 16 are padded, which must not show."""
    made = TrainedFp8Linear(linear(bias))
    x, g, weight = random(19, 48).requires_grad_(), random(19, 144, seed=1), made.weight.detach()
    y = made(x)
    y.backward(g)
    expected = rounded(x.detach()) @ rounded(weight).t()
    torch.testing.assert_close(y.detach(), expected if made.bias is None else expected + made.bias.detach())
    torch.testing.assert_close(x.grad, rounded(g) @ rounded(weight.t().contiguous()).t())
    columns = rounded(g.t().contiguous()) @ rounded(x.detach().t().contiguous()).t()
    torch.testing.assert_close(made.weight.grad, columns)
    if made.bias is not None:
        torch.testing.assert_close(made.bias.grad, g.sum(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_rounding_costs(dtype: torch.dtype) -> None:
    """3.7 % of noise in each product, whose roundings are independent: 2.6 % an operand."""
    made, exact = TrainedFp8Linear(linear(dtype=dtype)), linear(dtype=torch.float32)
    x, g = random(300, 48).to(dtype), random(300, 144, seed=1).to(dtype)
    pairs = (
        (made.product(x), exact.product(x.float())),
        (made.input_grad(g), exact.input_grad(g.float())),
        (made.weight_grad(g, x), exact.weight_grad(g.float(), x.float())),
    )
    for found, wanted in pairs:
        assert found.dtype == dtype
        assert 0.01 < (found.float() - wanted).norm() / wanted.norm() < 0.05


def test_a_token_of_a_thousandth_the_gradient_still_counts() -> None:
    """Scales are constant along tokens, whose gradients differ in size: e4m3 reaches down to 2^-9 of 448."""
    made, x, g = TrainedFp8Linear(linear()), random(64, 48), random(64, 144, seed=1)
    g[1:] *= 1e-3
    found = made.weight_grad(g[1:], x[1:])
    together = made.weight_grad(g, x) - made.weight_grad(g[:1], x[:1])
    wanted = g[1:].t() @ x[1:]
    assert (found - wanted).norm() / wanted.norm() < 0.05
    # In the shadow of a large token the rest is coarser: its error is that of the whole.
    whole = g.t() @ x
    assert (together - wanted).norm() / whole.norm() < 0.05


def test_the_weights_own_products_on_demand() -> None:
    plain, made = linear(), TrainedFp8Linear(linear())
    x, g = random(5, 48), random(5, 144)
    set_compute(made, "weights")
    assert torch.equal(made(x), plain(x))
    assert torch.equal(made.weight_grad(g, x), plain.weight_grad(g, x))
    set_compute(made, "fp8")
    made.fp8_weight_grad = False
    assert torch.equal(made.weight_grad(g, x), plain.weight_grad(g, x))
    assert not torch.equal(made.input_grad(g), plain.input_grad(g))


@pytest.mark.parametrize("config", [TINY, MIXTRAL], ids=["llama", "mixtral"])
def test_inner_blocks_are_taken_with_their_parameters(config: dict[str, Any]) -> None:
    model = decoder(config)
    names = [name for name, _ in model.named_parameters()]
    kept = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    train_in_fp8(model.blocks)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == kept
    assert [name for name, _ in model.named_parameters()] == names
    taken = {name for name, child in model.named_modules() if isinstance(child, TrainedFp8Linear)}
    assert {name.split(".")[1] for name in taken} == {"1", "2"}
    assert "blocks.1.attention.qkv" in taken
    assert not any("router" in name or "head" in name for name in taken)


def test_a_model_of_two_blocks_is_taken_whole() -> None:
    model = decoder(TINY | {"num_hidden_layers": 2})
    assert train_in_fp8(model.blocks) == 8


@pytest.mark.parametrize("config", [TINY, MIXTRAL], ids=["llama", "mixtral"])
def test_every_parameter_has_a_gradient_near_the_exact_one(config: dict[str, Any]) -> None:
    """An expert that no token came to has the gradient 0."""
    model = decoder(config)
    exact = gradients(model)
    train_in_fp8(model.blocks)
    found = gradients(model)
    assert found.keys() == exact.keys()
    if config is TINY:  # a rounding may send a token to another expert
        error = torch.stack([(found[name] - exact[name]).norm() for name in exact]).norm()
        assert 0 < error / torch.stack([tensor.norm() for tensor in exact.values()]).norm() < 0.2


def test_written_out_blocks_compute_what_eager_ones_do() -> None:
    """But for norms and activations in float32, whose roundings fp8 may turn into its own."""
    model = decoder()
    train_in_fp8(model.blocks)
    eager = gradients(model)
    model.is_fused = True
    fused = gradients(model)
    assert fused.keys() == eager.keys()
    error = torch.stack([(fused[name] - eager[name]).norm() for name in eager]).norm()
    assert error / torch.stack([tensor.norm() for tensor in eager.values()]).norm() < 0.03


@pytest.mark.parametrize("kind", ["block", "selective"])
@pytest.mark.parametrize("is_fused", [True, False])
def test_checkpointing_changes_nothing(kind: str, is_fused: bool) -> None:
    model = decoder()
    train_in_fp8(model.blocks)
    model.is_fused = is_fused
    expected = gradients(model)
    model.checkpointing = cast(Any, kind)
    found = gradients(model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_method_takes_them_and_the_transformers_backend_is_refused(tiny_model_dir: Callable[..., Path]) -> None:
    model = decoder()
    method = MethodSection(kind="full", fp8_compute=True)
    summary = apply_method(model, method, seed=0)
    assert summary.trainable_parameters == summary.total_parameters
    assert sum(isinstance(child, TrainedFp8Linear) for child in model.modules()) == 2 * 4
    foreign = load_model(tiny_model_dir("llama"), device="cpu", backend="transformers")
    with pytest.raises(UnsupportedModelError, match=r"native decoder.*method.fp8_compute to false"):
        apply_method(foreign, method, seed=0)
