"""Which products of gate and up go through SwiGLU's own launch, and that the answering pass takes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tunesmith.engine import fused_pass
from tunesmith.kernels.nf4 import kernels_on
from tunesmith.model.block import Mlp
from tunesmith.model.decode_linears import DecodeFp8Linear, DecodeLinear, adopted, swiglu_product
from tunesmith.model.fp8 import Fp8Linear
from tunesmith.model.int4 import Int4Linear
from tunesmith.model.int8 import Int8Linear
from tunesmith.model.layers import Linear

pytest.importorskip("triton")
PARTS, WIDTH = {"gate_proj": 48, "up_proj": 48}, 512


def made(kind: str) -> nn.Module:
    """A fused gate and up on the meta device, in one of the forms that answer."""
    given: dict[str, Any] = {"dtype": torch.bfloat16, "device": "meta"}
    if kind == "int4":
        return Int4Linear(WIDTH, PARTS, False, **given)
    if kind == "int4, sorted":
        return Int4Linear(WIDTH, PARTS, False, ordered=True, **given)
    if kind == "int8":
        return Int8Linear(WIDTH, PARTS, False, **given)
    if kind == "w8a8":
        return Int8Linear(WIDTH, PARTS, False, has_int8_products=True, **given)
    if kind.startswith("fp8"):
        return adopted(DecodeFp8Linear, Fp8Linear(WIDTH, PARTS, False, **given))
    with torch.device("meta"):
        linear = Linear(WIDTH, PARTS, False).to(torch.bfloat16)
    return adopted(DecodeLinear, linear) if kind == "bf16" else linear


@pytest.mark.parametrize(
    ("kind", "tokens", "is_taken"),
    [
        ("bf16", 1, True),
        ("bf16", 8, True),
        ("bf16", 9, False),
        ("int4", 1, True),
        ("int4", 64, True),
        ("int4", 65, False),
        ("int4, sorted", 1, False),
        ("int8", 32, True),
        ("int8", 33, False),
        ("w8a8", 1, False),
        ("fp8", 16, True),
        ("plain", 1, False),
    ],
)
def test_what_is_taken(kind: str, tokens: int, is_taken: bool) -> None:
    linear, x = made(kind), torch.empty(tokens, WIDTH, dtype=torch.bfloat16, device="meta")
    with torch.inference_mode(), kernels_on("meta"):
        h = swiglu_product(linear, x)
        assert (h is not None) is is_taken
        assert h is None or h.shape == (tokens, 48)
        assert swiglu_product(linear, x[None]) is None
    assert swiglu_product(linear, x) is None  # no kernels there
    with kernels_on("meta"):
        assert swiglu_product(linear, x) is None  # somebody may want gradients


@torch.inference_mode()
def test_the_answering_pass_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    mlp = Mlp.__new__(Mlp)
    nn.Module.__init__(mlp)
    mlp.is_swiglu = True
    mlp.up, mlp.down = nn.Linear(4, 12, bias=False), nn.Linear(6, 4, bias=False)
    y, h = torch.randn(2, 4), torch.randn(2, 6)
    apart = fused_pass._mlp(mlp, y)
    torch.testing.assert_close(apart, mlp.down(nn.functional.silu(mlp.up(y)[:, :6]) * mlp.up(y)[:, 6:]))
    monkeypatch.setattr(fused_pass, "swiglu_product", lambda linear, given: h if linear is mlp.up else None)
    assert torch.equal(fused_pass._mlp(mlp, y), mlp.down(h))
