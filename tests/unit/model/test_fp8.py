"""Linears in fp8: the face of a linear, the numbers of the dequantised weight, and NF4 linears that compute in fp8."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from tunesmith.arch import config_from_dict
from tunesmith.kernels.fp8 import FP8, dequantize_rows, fp8_product, quantize_rows_fp8
from tunesmith.kernels.nf4_fp8 import nf4_to_fp8
from tunesmith.model import fp8 as fp8_module
from tunesmith.model import quant as quant_module
from tunesmith.model.decoder import Decoder
from tunesmith.model.fp8 import Fp8Linear, quantise_linears_fp8, quantised_fp8
from tunesmith.model.layers import Linear
from tunesmith.model.lora import AdaptedLinear, AdapterOptions
from tunesmith.model.quant import NF4Linear, dense_weight, quantise_blocks, quantised, quantised_as, set_compute

PARTS = {"q_proj": 64, "k_proj": 32, "v_proj": 32}
WIDTH = 48
MIXTRAL = {
    "model_type": "mixtral", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2,
}  # fmt: skip


def linear(bias: bool = True, dtype: torch.dtype = torch.float32) -> Linear:
    torch.manual_seed(0)
    made = Linear(WIDTH, PARTS, bias)
    torch.nn.init.normal_(made.weight)
    if made.bias is not None:
        torch.nn.init.normal_(made.bias)
    return made.to(dtype)


def held(kind: Literal["fp8", "nf4-double"], bias: bool = True) -> Fp8Linear | NF4Linear:
    made = quantised_as(linear(bias), kind)
    set_compute(made, "fp8")
    return made


def weight_used(made: Fp8Linear | NF4Linear) -> Tensor:
    """The weight that products in fp8 multiply by."""
    if isinstance(made, Fp8Linear):
        return made.weight(torch.float32)
    fp8 = nf4_to_fp8([made.part_nf4(part) for part in made.parts])
    return dequantize_rows(fp8.codes, fp8.scale, torch.float32)


def rounded(x: Tensor, fold: Tensor | None = None) -> Tensor:
    """x after its rows were quantised."""
    codes, scale = quantize_rows_fp8(x, fold)
    return codes.float() * scale


@pytest.mark.parametrize("kind", ["fp8", "nf4-double"])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradient_are_those_of_the_dequantised_weight(
    kind: Literal["fp8", "nf4-double"], bias: bool
) -> None:
    made = held(kind, bias)
    weight = weight_used(made)
    x = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = made(x)
    assert y.shape == (2, 7, 128)
    exact = rounded(x.detach().flatten(0, 1)) @ weight.t()
    exact = exact if made.bias is None else exact + made.bias
    assert torch.allclose(y.flatten(0, 1), exact, rtol=1e-4, atol=1e-4)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    y.backward(direction)
    assert x.grad is not None
    # Folded in and rounded, the gradient still meets the codes alone: divided out again, it met the whole weight.
    scale = made.scale if isinstance(made, Fp8Linear) else made.row_scales()
    expected = (rounded(direction.flatten(0, 1), scale) / scale) @ weight
    assert torch.allclose(x.grad.flatten(0, 1), expected, rtol=1e-4, atol=1e-3)
    plain = direction.flatten(0, 1) @ weight
    assert (x.grad.flatten(0, 1) - plain).norm() / plain.norm() < 0.04


@pytest.mark.parametrize("kind", ["fp8", "nf4-double"])
def test_products_from_weights_are_exactly_those_of_the_dequantised_weight(
    kind: Literal["fp8", "nf4-double"],
) -> None:
    made = held(kind)
    set_compute(made, "weights")
    x = torch.randn(7, WIDTH)
    dense = linear()
    dense.load_part("q_proj", made.part_weight("q_proj"))
    dense.load_part("k_proj", made.part_weight("k_proj"))
    dense.load_part("v_proj", made.part_weight("v_proj"))
    g = torch.randn(7, 128)
    assert torch.equal(made(x), dense(x))
    assert torch.equal(made.input_grad(g), dense.input_grad(g))
    assert torch.equal(dense_weight(made, torch.float32), dense.weight)


def test_a_dense_linear_has_the_same_two_products() -> None:
    dense = linear()
    x = torch.randn(7, WIDTH, requires_grad=True)
    y = dense(x)
    g = torch.randn_like(y)
    assert torch.equal(dense.product(x), y)
    assert torch.allclose(torch.autograd.grad(y, x, g)[0], dense.input_grad(g), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_output_and_gradient_have_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    made = quantised_fp8(linear(dtype=torch.bfloat16))
    x = torch.randn(3, WIDTH, dtype=dtype, requires_grad=True)
    y = made(x)
    y.sum().backward()
    assert y.dtype == dtype
    assert x.grad is not None and x.grad.dtype == dtype


def test_each_projection_is_as_held_alone_and_a_wrong_shape_is_refused() -> None:
    dense = linear(dtype=torch.bfloat16)
    made = quantised_fp8(dense)
    assert made.dtype == torch.bfloat16
    assert made.weight_bytes == 128 * WIDTH + 128 * 4
    for part in PARTS:
        assert made.part_fp8(part).shape == (PARTS[part], WIDTH)
        assert torch.equal(made.part_weight(part), made.weight()[made.rows(part)])
        error = made.part_weight(part, torch.float32) - dense.part_weight(part).float()
        assert error.norm() / dense.part_weight(part).float().norm() < 0.03
    with pytest.raises(ValueError, match="q_proj must have shape"):
        made.load_part("q_proj", torch.zeros(3, 3))


def test_conversions_leave_codes_and_scales_alone() -> None:
    made = quantised_fp8(linear()).to(torch.bfloat16)
    assert made.codes.dtype == FP8
    assert made.scale.dtype == torch.float32
    assert made.bias is not None and made.bias.dtype == torch.bfloat16
    assert torch.equal(made.weight(torch.float32), quantised_fp8(linear()).weight(torch.float32))


def test_nothing_but_the_codes_is_held_for_the_backward_pass() -> None:
    made = held("fp8")
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        made(torch.randn(4, WIDTH, requires_grad=True))
    assert saved == []


def test_every_linear_of_the_blocks_is_replaced_on_the_meta_device_too() -> None:
    with torch.device("meta"):
        decoder = Decoder(config_from_dict(MIXTRAL))
        quantise_linears_fp8(decoder)
    names = {name for name, child in decoder.named_modules() if isinstance(child, Fp8Linear)}
    left = {name for name, child in decoder.named_modules() if type(child) is Linear}
    assert len(names) == 2 * (2 + 3 * 2)
    assert all(name == "head" or name.endswith("router") for name in left)
    decoder.to_empty(device="cpu")
    assert all(b.device.type == "cpu" for b in decoder.buffers())


@pytest.mark.parametrize("kind", ["fp8", "nf4-double"])
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_on_top_start_as_the_base_and_get_gradients(kind: Literal["fp8", "nf4-double"], dora: bool) -> None:
    made = held(kind)
    options = AdapterOptions(4, 8.0, dora=dora)
    adapted = AdaptedLinear(made, PARTS, dict.fromkeys(PARTS, options))
    for part in PARTS:
        adapted.adapter(part).reset(part, 0)
    x = torch.randn(5, WIDTH, requires_grad=True)
    assert torch.allclose(adapted(x), made(x), rtol=1e-3, atol=1e-2 if dora else 1e-5)
    adapted(x).square().sum().backward()
    assert all(adapted.adapter(part).B.grad is not None for part in PARTS)
    merged = torch.cat([adapted.merged_part(part) for part in PARTS])
    assert torch.allclose(merged, made.weight(torch.float32), rtol=1e-5, atol=1e-5)


def test_row_scales_of_nf4_follow_a_new_weight() -> None:
    made = quantised(linear(), True)
    before = made.row_scales()
    made.load_part("q_proj", 2 * linear().part_weight("q_proj"))
    assert not torch.equal(made.row_scales(), before)


@pytest.mark.parametrize("kind", ["fp8", "nf4-double"])
def test_products_say_which_pass_they_belong_to(
    kind: Literal["fp8", "nf4-double"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """How a product on a GPU sums is chosen by direction."""
    made, said = held(kind), []

    def product(*arguments: Any, backward: bool = False) -> Tensor:
        said.append(backward)
        return fp8_product(*arguments, backward=backward)

    for module in (fp8_module, quant_module):
        monkeypatch.setattr(module, "fp8_product", product)
    made(torch.randn(3, WIDTH, requires_grad=True)).sum().backward()
    assert said == [False, True]


def test_inner_blocks_alone_are_held_in_fp8() -> None:
    with torch.device("meta"):
        decoder = Decoder(config_from_dict({**MIXTRAL, "num_hidden_layers": 4}))
        quantise_blocks(decoder, "fp8-inner")
        short = Decoder(config_from_dict(MIXTRAL))
        quantise_blocks(short, "fp8-inner")
    held_by_block = [any(isinstance(child, Fp8Linear) for child in block.modules()) for block in decoder.blocks]
    assert held_by_block == [False, True, True, False]
    assert all(any(isinstance(child, Fp8Linear) for child in block.modules()) for block in short.blocks)
