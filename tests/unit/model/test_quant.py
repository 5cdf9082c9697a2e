"""NF4 linears: the face of a linear, the same numbers as its dequantised weight, and nothing held for the backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tunesmith.arch import config_from_dict
from tunesmith.formats import FORMATS
from tunesmith.kernels.nf4 import quantize_nf4
from tunesmith.model.decoder import Decoder
from tunesmith.model.layers import Linear
from tunesmith.model.quant import NF4Linear, dense_weight, quantise_linears, quantised

PARTS = {"q_proj": 64, "k_proj": 32, "v_proj": 32}
MIXTRAL = {
    "model_type": "mixtral", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2,
}  # fmt: skip


def linear(bias: bool = True, dtype: torch.dtype = torch.float32) -> Linear:
    torch.manual_seed(0)
    made = Linear(48, PARTS, bias)
    torch.nn.init.normal_(made.weight)
    if made.bias is not None:
        torch.nn.init.normal_(made.bias)
    return made.to(dtype)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_projection_is_quantised_on_its_own(double: bool, dtype: torch.dtype) -> None:
    dense = linear(dtype=dtype)
    nf4 = quantised(dense, double)
    for part in PARTS:
        mine, alone = nf4.part_nf4(part), quantize_nf4(dense.part_weight(part), double)
        assert torch.equal(mine.codes, alone.codes)
        assert torch.equal(mine.scales, alone.scales)
        assert mine.dtype == dtype
        assert torch.equal(nf4.part_weight(part), nf4.weight()[nf4.rows(part)])
    assert nf4.weight().shape == (128, 48)
    expected = sum(FORMATS["nf4-double" if double else "nf4"].bytes_for(rows * 48) for rows in PARTS.values())
    assert nf4.weight_bytes == expected


@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradient_are_those_of_the_dequantised_weight(bias: bool) -> None:
    nf4 = quantised(linear(bias), True)
    dense = linear(bias).requires_grad_(False)
    dense.weight.copy_(nf4.weight())
    x = torch.randn(7, 48, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    out, expected = nf4(x), dense(y)
    assert torch.equal(out, expected)
    cotangent = torch.randn_like(out)
    out.backward(cotangent)
    expected.backward(cotangent)
    assert x.grad is not None and y.grad is not None
    assert torch.allclose(x.grad, y.grad, rtol=1e-5, atol=1e-5)


def test_output_is_in_the_dtype_of_the_input() -> None:
    nf4 = quantised(linear(), True)
    assert nf4(torch.randn(3, 48, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_backward_holds_no_dequantised_weight() -> None:
    nf4 = quantised(linear(False), True)
    held: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: held.append(tensor) or tensor, lambda tensor: tensor):
        nf4(torch.randn(3, 48, requires_grad=True)).sum()
    assert held == []


def test_conversion_to_another_dtype_leaves_the_scales_alone() -> None:
    nf4 = quantised(linear(), True)
    before = nf4.weight(torch.float32)
    nf4.to(torch.bfloat16)
    assert nf4.bias is not None and nf4.bias.dtype == torch.bfloat16
    assert torch.equal(nf4.weight(torch.float32), before)


def test_wrong_shape_is_refused() -> None:
    nf4 = quantised(linear(), True)
    with pytest.raises(ValueError, match="k_proj must have shape"):
        nf4.load_part("k_proj", torch.zeros(64, 48))


def test_quantise_linears_spares_head_router_and_embedding() -> None:
    torch.manual_seed(0)
    decoder = Decoder(config_from_dict(MIXTRAL))
    quantise_linears(decoder, True)
    kinds = {name: type(child) for name, child in decoder.named_modules() if hasattr(child, "parts")}
    dense = {name for name, kind in kinds.items() if kind is Linear}
    assert dense == {"head", "blocks.0.mlp.router", "blocks.1.mlp.router"}
    assert sum(kind is NF4Linear for kind in kinds.values()) == 2 * (2 + 3 * 2)
    assert not any(p.requires_grad for c in decoder.modules() if isinstance(c, NF4Linear) for p in c.parameters())


def test_built_on_the_meta_device_and_filled_afterwards() -> None:
    with torch.device("meta"):
        decoder = Decoder(config_from_dict(MIXTRAL)).to(torch.bfloat16)
    quantise_linears(decoder, False)
    up = decoder.get_submodule("blocks.0.mlp.experts.1.up")
    assert isinstance(up, NF4Linear)
    assert up.part_nf4("gate_proj").codes.is_meta
    shell_bytes = up.weight_bytes
    decoder.to_empty(device="cpu")
    weight = torch.randn(64, 32)
    up.load_part("gate_proj", weight)
    assert up.weight_bytes == shell_bytes
    # What arrives is brought to the dtype of the model before it is quantised.
    assert torch.equal(up.part_nf4("gate_proj").codes, quantize_nf4(weight.bfloat16(), False).codes)


def test_dense_weight_of_every_kind_of_linear() -> None:
    from transformers.pytorch_utils import Conv1D

    conv, plain = Conv1D(5, 3), torch.nn.Linear(3, 5)
    plain.weight.data = conv.weight.data.t()
    assert torch.equal(dense_weight(conv, torch.float32), dense_weight(plain, torch.float32))
    assert dense_weight(linear(), torch.bfloat16).dtype == torch.bfloat16
    nf4 = quantised(linear(), True)
    x = torch.randn(2, 48)
    assert torch.equal(F.linear(x, dense_weight(nf4, torch.float32), nf4.bias), nf4(x))
