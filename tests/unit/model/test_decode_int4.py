"""int4 linears that answer: which inputs they take in bytes, who writes those, and what they give."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tunesmith.kernels import int4_bytes
from tunesmith.kernels.add_rms_norm import add_rms_norm_
from tunesmith.kernels.nf4 import kernels_on
from tunesmith.kernels.swiglu import swiglu
from tunesmith.model import decode_int4
from tunesmith.model.decode_int4 import DecodeInt4Linear, InBytes, normed_for, product_of, swiglu_for, wants_bytes
from tunesmith.model.decode_linears import adopted, swiglu_product, use_decode_linears
from tunesmith.model.int4 import Int4Linear

PARTS = {"gate_proj": 24, "up_proj": 24}


@pytest.fixture
def by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens go by bytes on this machine too, by the reference."""
    monkeypatch.setattr(
        decode_int4, "takes_bytes", lambda weight, tokens, dtype: tokens <= 8 and dtype == torch.bfloat16
    )


def made(group: int = 64, *, ordered: bool = False) -> DecodeInt4Linear:
    generator = torch.Generator().manual_seed(0)
    linear = Int4Linear(512, PARTS, True, group_size=group, ordered=ordered, dtype=torch.bfloat16)
    for part, rows in PARTS.items():
        linear.load_part(part, torch.randn(rows, 512, generator=generator) * 0.05, torch.randn(rows))
    return adopted(DecodeInt4Linear, linear.requires_grad_(False))


def given(tokens: int = 3) -> torch.Tensor:
    return torch.randn(tokens, 512, generator=torch.Generator().manual_seed(1)).bfloat16()


@pytest.mark.parametrize("group", [128, 64, 32])
@torch.inference_mode()
def test_bytes_give_the_linears_product(group: int, by_bytes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    linear, x = made(group), given()
    seen: list[int] = []
    product = DecodeInt4Linear.product_of_codes
    monkeypatch.setattr(DecodeInt4Linear, "product_of_codes", lambda *args: (seen.append(1), product(*args))[1])
    found = linear(x)
    assert seen
    wanted = x.double() @ linear.weight(torch.float32).double().t() + linear.bias.double()
    torch.testing.assert_close(found.double(), wanted, rtol=2.0**-7, atol=2e-3)
    assert torch.equal(linear(x[None]), found[None])
    seen.clear()
    torch.testing.assert_close(linear(given(9))[:3].double(), wanted, rtol=2.0**-6, atol=5e-2)
    linear(x.float())
    assert not seen


@torch.inference_mode()
def test_columns_in_another_order_are_multiplied_as_they_were(by_bytes: None) -> None:
    linear = made(ordered=True)
    assert not linear.wants_codes(1, torch.bfloat16)
    assert not wants_bytes(linear, given(1))


@torch.inference_mode()
def test_norm_and_swiglu_write_bytes_for_whom_wants_them(by_bytes: None) -> None:
    linear, delta, weight = made(), given(), torch.rand(512)
    stream, other = given().flip(0), given().flip(0)
    y = normed_for(linear, stream, delta, weight, 1e-6)
    wanted = add_rms_norm_(other, delta, weight, 1e-6)
    assert isinstance(y, InBytes)
    assert torch.equal(stream, other)
    assert torch.equal(product_of(linear, y), linear(wanted))
    gate_up = torch.cat([given(), given().flip(1)], dim=1)
    h = swiglu_for(linear, gate_up)
    assert h is not None
    assert torch.equal(product_of(linear, h), linear(swiglu(gate_up)))
    # Whoever reads 16 bits: other linears, none, more tokens, linears with something around them.
    for reader in (
        None,
        nn.Linear(512, 4),
        nn.Sequential(linear),
        adopted(type("Part", (DecodeInt4Linear,), {}), linear),
    ):
        assert isinstance(normed_for(reader, stream, delta, weight, 1e-6), torch.Tensor)
        assert reader is None or swiglu_for(reader, gate_up) is None
    assert isinstance(normed_for(linear, given(9), given(9), weight, 1e-6), torch.Tensor)
    assert swiglu_for(linear, gate_up.float()) is None
    plain = nn.Linear(512, 4, dtype=torch.bfloat16)
    assert torch.equal(product_of(plain, delta), plain(delta))


def test_it_stands_where_few_tokens_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate and up of tokens that go by bytes have no launch with SwiGLU; of more, and where it is off, they do."""
    pytest.importorskip("triton")
    model = nn.Sequential(Int4Linear(512, PARTS, True, dtype=torch.bfloat16, device="meta"))
    use_decode_linears(model)
    assert type(model[0]) is Int4Linear  # no kernels there
    with torch.inference_mode(), kernels_on("meta"):
        use_decode_linears(model)
        linear = model[0]
        assert isinstance(linear, DecodeInt4Linear)
        few, many = (torch.empty(n, 512, dtype=torch.bfloat16, device="meta") for n in (8, 9))
        assert linear(few).shape == (8, 48)
        assert swiglu_product(linear, few) is None
        assert swiglu_product(linear, many) is not None
        monkeypatch.setattr(int4_bytes, "MOST_TOKENS", {})
        assert swiglu_product(linear, few) is not None
        assert not wants_bytes(linear, few)
