"""The chunked loss against torch's own cross-entropy on whole logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tunesmith.arch import config_from_dict
from tunesmith.checkpoint.load import load_model
from tunesmith.model.decoder import Decoder
from tunesmith.model.transformers_backend import TransformersModel
from tunesmith.train.losses import IGNORED, Head, cross_entropy_sum, head_of, trained_positions

T, D, V = 37, 8, 23
KINDS = ["weight", "function"]


def _as(kind: str, head: nn.Linear) -> torch.Tensor | Head:
    """A head as cross_entropy_sum takes it: by its weight, or as any function."""
    return head.weight if kind == "weight" else head


def _inputs() -> tuple[torch.Tensor, torch.Tensor, nn.Linear]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(T, D, generator=generator, requires_grad=True)
    targets = torch.randint(0, V, (T,), generator=generator)
    targets[torch.rand(T, generator=generator) < 0.4] = IGNORED
    torch.manual_seed(5)
    return hidden, targets, nn.Linear(D, V, bias=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_tokens", [1, 4, 7, T, 1000])
def test_loss_and_gradients_are_those_of_whole_logits(chunk_tokens: int, kind: str) -> None:
    hidden, targets, head = _inputs()
    loss = cross_entropy_sum(hidden, *trained_positions(targets), _as(kind, head), chunk_tokens)
    loss.backward()
    ours = hidden.grad.clone(), head.weight.grad.clone()
    hidden.grad = head.weight.grad = None
    expected = F.cross_entropy(head(hidden), targets, ignore_index=IGNORED, reduction="sum")
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours[0], hidden.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours[1], head.weight.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_tied_head_gets_the_gradient_of_both_uses(kind: str) -> None:
    _, targets, _ = _inputs()
    tokens = torch.arange(T) % V
    gradients = []
    for chunk_tokens in (5, None):
        weight = torch.randn(V, D, generator=torch.Generator().manual_seed(1)).requires_grad_()
        hidden = torch.tanh(F.embedding(tokens, weight))
        if chunk_tokens is None:
            loss = F.cross_entropy(F.linear(hidden, weight), targets, ignore_index=IGNORED, reduction="sum")
        else:
            index, chosen = trained_positions(targets)
            head = weight if kind == "weight" else lambda h, w=weight: F.linear(h, w)
            loss = cross_entropy_sum(hidden, index, chosen, head, chunk_tokens)
        loss.backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)


def test_no_more_logits_than_a_chunk_are_ever_made() -> None:
    hidden, targets, head = _inputs()
    seen: list[int] = []

    def watched(part: torch.Tensor) -> torch.Tensor:
        seen.append(part.shape[0])
        return head(part)

    index, chosen = trained_positions(targets)
    cross_entropy_sum(hidden, index, chosen, watched, 4).backward()
    assert max(seen) == 4
    assert sum(seen) == 2 * index.numel()  # once forward, once again in the backward pass


@pytest.mark.parametrize("kind", KINDS)
def test_softmax_is_in_float32_for_a_half_precision_head(kind: str) -> None:
    hidden, targets, head = _inputs()
    index, chosen = trained_positions(targets)
    half = head.to(torch.bfloat16)
    loss = cross_entropy_sum(hidden.bfloat16(), index, chosen, _as(kind, half), 8)
    logits = F.linear(hidden.bfloat16(), half.weight).float()
    expected = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_targets_has_a_zero_gradient(kind: str) -> None:
    hidden, _, head = _inputs()
    loss = cross_entropy_sum(hidden, *trained_positions(torch.full((T,), IGNORED)), _as(kind, head), 8)
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients_there_is_a_loss_and_no_graph(kind: str) -> None:
    hidden, targets, head = _inputs()
    with torch.no_grad():
        loss = cross_entropy_sum(hidden, *trained_positions(targets), _as(kind, head), 8)
    assert not loss.requires_grad
    expected = F.cross_entropy(head(hidden), targets, ignore_index=IGNORED, reduction="sum")
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0)


def _decoder(**keys: object) -> Decoder:
    config = {
        "model_type": "qwen2",
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
    }
    return Decoder(config_from_dict({**config, **keys}))


def test_a_plain_head_is_its_weight_and_any_other_a_function() -> None:
    model = _decoder(tie_word_embeddings=False)
    assert head_of(model) is model.head.weight
    model.head.bias = nn.Parameter(torch.zeros(V))
    assert head_of(model) == model.logits
    model.head = nn.Sequential(nn.Linear(D, V, bias=False))
    assert head_of(model) == model.logits
    tied = _decoder(tie_word_embeddings=True)
    assert head_of(tied) is tied.embedding.weight


def test_a_transformers_head_is_its_weight_unless_something_follows_it(tiny_model_dir: Callable[..., Path]) -> None:
    model = load_model(tiny_model_dir("qwen2"), backend="transformers", dtype="float32", device="cpu")
    assert isinstance(model, TransformersModel)
    weight = head_of(model)
    assert isinstance(weight, torch.Tensor)
    hidden = torch.randn(3, weight.shape[1])
    torch.testing.assert_close(F.linear(hidden, weight), model.logits(hidden))
    model._finish = lambda logits: logits * 2
    assert head_of(model) == model.logits
