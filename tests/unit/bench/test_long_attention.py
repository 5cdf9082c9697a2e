"""Attention of one long document beside the formula: what is right passes, what is off in one place does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tunesmith.arch import ModelConfig
from tunesmith.bench.long_attention import AttentionCheck, check_attention
from tunesmith.model.attention import PackedAttention

CONFIG = ModelConfig(
    family="llama",
    vocab_size=32,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    norm_eps=1e-6,
)
Spoil = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def _check(dtype: torch.dtype = torch.float32) -> AttentionCheck:
    return check_attention(CONFIG, 96, torch.device("cpu"), dtype, rows=8)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_right_attention(dtype: torch.dtype, most: float) -> None:
    check = _check(dtype)
    assert check.is_right
    assert check.worst < most
    assert check.tokens == 96


@pytest.mark.parametrize(
    "spoil",
    [
        lambda q, k, v: (q, k, torch.cat((v[:50], v[49:95]))),  # rows that are read one too early
        lambda q, k, v: (q, torch.cat((k[:50], k[:46])), v),  # an offset that began at zero again
        lambda q, k, v: (torch.cat((q[:95], q[:1])), k, v),
        lambda q, k, v: (q, k, v * float("nan")),
    ],
)
def test_wrong_rows_are_seen(spoil: Spoil, monkeypatch: pytest.MonkeyPatch) -> None:
    right = PackedAttention.__getitem__
    monkeypatch.setattr(PackedAttention, "__getitem__", lambda self, i: lambda *qkv: right(self, i)(*spoil(*qkv)))
    assert not _check().is_right


def test_a_kernel_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Tensor) -> Tensor:
        raise RuntimeError("no plan for this shape")

    monkeypatch.setattr(PackedAttention, "__getitem__", lambda self, i: fails)
    check = _check()
    assert (check.error, check.is_right) == ("no plan for this shape", False)
