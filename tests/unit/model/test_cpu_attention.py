"""Attention with held probabilities against torch's own, outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tunesmith.arch import ModelConfig
from tunesmith.model import cpu_attention
from tunesmith.model.attention import PackedAttention
from tunesmith.model.cpu_attention import LONGEST, SHORTEST, attend_compiled, attend_held, fits_compiled, fits_held
from tunesmith.model.packed import pack_documents


def _formula(query: Tensor, key: Tensor, value: Tensor, length: int) -> Tensor:
    q, k, v = (t.unflatten(0, (-1, length)).transpose(1, 2) for t in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(-1, -2) / query.shape[-1] ** 0.5
    scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(0, 1)


def _drawn(documents: int, length: int, heads: tuple[int, int, int]) -> tuple[list[Tensor], Tensor]:
    """query, key and value as views of one projection, float64 copies of which are the truth; the gradient."""
    torch.manual_seed(0)
    num_heads, num_kv_heads, head_dim = heads
    qkv = torch.randn(documents * length, num_heads + 2 * num_kv_heads, head_dim)
    parts = [part.detach().requires_grad_() for part in qkv.split((num_heads, num_kv_heads, num_kv_heads), 1)]
    return parts, torch.randn(documents * length, num_heads, head_dim)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 150, 256])
@pytest.mark.parametrize("heads", [(4, 2, 16), (3, 3, 8), (6, 1, 24)])
def test_equal_to_the_formula(length: int, heads: tuple[int, int, int]) -> None:
    parts, g = _drawn(2, length, heads)
    exact = [part.detach().double().requires_grad_() for part in parts]
    out, expected = attend_held(*parts, length), _formula(*exact, length)
    assert out.is_contiguous()
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    grads = torch.autograd.grad(out, parts, g)
    truth = torch.autograd.grad(expected, exact, g.double())
    for got, wanted in zip(grads, truth, strict=True):
        torch.testing.assert_close(got.double(), wanted, atol=1e-5, rtol=1e-5)


def test_gradients_are_neighbours_in_one_buffer() -> None:
    parts, g = _drawn(2, 8, (4, 2, 16))
    query, key, value = torch.autograd.grad(attend_held(*parts, 8), parts, g)
    assert query.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
    assert [part.storage_offset() for part in (query, key, value)] == [0, 4 * 16, 6 * 16]


def test_the_same_bits_twice() -> None:
    parts, g = _drawn(2, 100, (4, 2, 16))
    runs = [torch.autograd.grad(attend_held(*parts, 100), parts, g) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_where_it_fits() -> None:
    (query, key, value), _ = _drawn(1, 4, (2, 2, 8))
    assert fits_held(query, key, value, SHORTEST)
    assert fits_held(query, key, value, LONGEST)
    assert not fits_held(query, key, value, SHORTEST - 1)
    assert not fits_held(query, key, value, LONGEST + 1)
    assert not fits_held(query.bfloat16(), key.bfloat16(), value.bfloat16(), SHORTEST)
    assert not fits_held(query.detach(), key.detach(), value.detach(), SHORTEST)
    with torch.no_grad():
        assert not fits_held(query, key, value, SHORTEST)


@pytest.mark.parametrize(
    ("lengths", "window", "is_held"),
    [((300, 300), None, True), ((300, 300), 300, True), ((300, 300), 299, False), ((300, 200), None, False)],
)
def test_packed_attention_takes_it(
    lengths: tuple[int, ...], window: int | None, is_held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig(
        family="llama",
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        norm_eps=1e-6,
        sliding_window=window,
        sliding_layers=() if window is None else (0,),
    )
    attend = PackedAttention(config, pack_documents([[1] * length for length in lengths]))[0]
    parts, g = _drawn(1, sum(lengths), (4, 2, 8))
    out = attend(*parts)
    assert ("_Held" in type(out.grad_fn).__name__) == is_held
    grads = torch.autograd.grad(out, parts, g)
    monkeypatch.setattr(cpu_attention, "LONGEST", 0)
    reference = attend(*parts)
    torch.testing.assert_close(out, reference, atol=1e-5, rtol=1e-5)
    for got, wanted in zip(grads, torch.autograd.grad(reference, parts, g), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("cpu_operations")
@pytest.mark.parametrize("lengths", [(1, 2), (40, 33, 64, 1), (150,)])
@pytest.mark.parametrize("heads", [(4, 2, 16), (3, 3, 48), (2, 1, 128)])
def test_compiled_equals_the_formula(lengths: tuple[int, ...], heads: tuple[int, int, int]) -> None:
    parts, g = _drawn(1, sum(lengths), heads)
    assert fits_compiled(*parts)
    exact = [part.detach().double().requires_grad_() for part in parts]
    documents = zip(*(part.split(lengths) for part in exact), strict=True)
    expected = torch.cat([_formula(q, k, v, len(q)) for q, k, v in documents])
    out = attend_compiled(*parts, lengths)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    grads = torch.autograd.grad(out, parts, g, retain_graph=True)
    truth = torch.autograd.grad(expected, exact, g.double())
    for got, wanted in zip(grads, truth, strict=True):
        torch.testing.assert_close(got.double(), wanted, atol=1e-5, rtol=1e-5)
    again = torch.autograd.grad(out, parts, g)
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))


@pytest.mark.usefixtures("cpu_operations")
def test_compiled_isolates_documents_to_the_bit() -> None:
    """What a document is packed with does not show in its output or gradients."""
    parts, g = _drawn(1, 90, (4, 2, 16))
    packed = attend_compiled(*parts, (37, 53))
    alone = attend_compiled(*(part[37:] for part in parts), (53,))
    assert torch.equal(packed[37:], alone)
    found = torch.autograd.grad(packed, parts, g)
    lone = torch.autograd.grad(alone, parts, g[37:])
    assert all(torch.equal(a[37:], b[37:]) for a, b in zip(found, lone, strict=True))


@pytest.mark.usefixtures("cpu_operations")
def test_compiled_only_heads_of_whole_vectors() -> None:
    parts, _ = _drawn(1, 4, (2, 2, 8))
    assert not fits_compiled(*parts)
