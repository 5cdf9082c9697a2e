"""Which norms of a pass are left to the linears around them, and that these then give the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tunesmith.arch import config_from_dict
from tunesmith.kernels import stream_products
from tunesmith.kernels.nf4 import kernels_on
from tunesmith.model import stream_linears
from tunesmith.model.block import Block
from tunesmith.model.decode_linears import use_decode_linears
from tunesmith.model.decoder import Decoder
from tunesmith.model.fp8 import quantise_linears_fp8
from tunesmith.model.int4 import Int4Linear
from tunesmith.model.int8 import Int8Linear
from tunesmith.model.layers import Linear
from tunesmith.model.stream import WholeStream
from tunesmith.model.stream_linears import Joined, joined_norms, normed_product

pytest.importorskip("triton")
ALL, LAST = Joined(True, True), Joined(True, False)
CONFIG: dict[str, Any] = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}


def made(kind: str = "bf16", dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Decoder:
    """A decoder on the meta device whose blocks' linears are in one of the forms that answer."""
    with torch.device("meta"):
        decoder = Decoder(config_from_dict({**CONFIG, **changes})).to(dtype)
    if kind == "fp8":
        quantise_linears_fp8(decoder)
    elif kind != "bf16":
        for parent in list(decoder.blocks.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, Linear):
                    setattr(parent, name, held(kind, child))
    with kernels_on("meta"):
        use_decode_linears(decoder)
    return decoder


def held(kind: str, linear: Linear) -> nn.Module:
    form = Int4Linear if kind == "int4" else Int8Linear
    more = {"has_int8_products": True} if kind == "w8a8" else {}
    has_bias = linear.bias is not None
    return form(linear.in_features, linear.parts, has_bias, dtype=torch.bfloat16, device="meta", **more)


@torch.inference_mode()
def joined(decoder: Decoder, tokens: int, dtype: torch.dtype = torch.bfloat16) -> list[Joined]:
    stream = torch.empty(tokens, decoder.config.hidden_size, dtype=dtype, device="meta")
    with kernels_on("meta"):
        return joined_norms(list(decoder.blocks), stream)


@pytest.mark.parametrize(
    ("kind", "tokens", "is_joined"),
    [
        ("bf16", 1, True),
        ("bf16", 8, True),
        ("bf16", 9, False),
        ("fp8", 1, True),
        ("fp8", 8, True),
        ("int8", 5, True),
        ("w8a8", 1, False),
        ("int4", 1, False),
        ("bf16", 0, False),
    ],
)
def test_what_is_joined(kind: str, tokens: int, is_joined: bool) -> None:
    """All but the norm behind the last block, which nobody of these reads."""
    assert joined(made(kind), tokens) == ([ALL, ALL, LAST] if is_joined else [Joined()] * 3)


def test_float16_models_others_and_a_constant_keep_every_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = made()
    assert joined(made(dtype=torch.float16), 1, torch.float16) == [Joined()] * 3
    with kernels_on("meta"):  # somebody may want gradients
        assert joined_norms(list(decoder.blocks), torch.empty(1, 256, dtype=torch.bfloat16)) == [Joined()] * 3
    monkeypatch.setattr(stream_products, "MOST_TOKENS", 0)
    assert joined(decoder, 1) == [Joined()] * 3


def test_processes_that_share_a_model_keep_every_norm() -> None:
    decoder = made()
    for block in decoder.blocks:
        block.stream = WholeStream()
    assert joined(decoder, 1) == [Joined()] * 3


def test_a_linear_in_another_form_keeps_the_norms_beside_it() -> None:
    """As adapters have it, which put a module of their own in a linear's place."""
    decoder = made("fp8")
    second = decoder.blocks[1]
    assert isinstance(second, Block)
    second.attention.qkv = nn.Sequential(second.attention.qkv)
    second.attention.qkv.in_features = 256
    assert joined(decoder, 1) == [Joined(True, False), ALL, LAST]
    second.mlp.down = nn.Identity()
    second.mlp.down.in_features = 384
    assert joined(decoder, 1) == [Joined(True, False), Joined(True, False), LAST]


def test_weights_too_large_for_few_tokens_keep_theirs() -> None:
    """Of 16 bits: gate and up of more than 16 MiB are multiplied by others, but for one token."""
    decoder = made(intermediate_size=32_768 + 64)
    assert joined(decoder, 1) == [ALL, ALL, LAST]
    assert joined(decoder, 2) == [Joined()] * 3


def test_experts_keep_their_norms() -> None:
    decoder = made(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2, attention_bias=False)
    assert joined(decoder, 1) == [Joined()] * 3


def test_what_is_normed_already_goes_through_the_linear() -> None:
    linear, y = nn.Linear(4, 3), torch.randn(2, 4)
    assert torch.equal(normed_product(linear, y), linear(y))
    assert stream_linears.normed_swiglu(linear, y) is None
