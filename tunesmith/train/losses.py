"""Cross-entropy over the trained tokens only; whole logits are never held."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tunesmith.kernels.cross_entropy import IGNORED as IGNORED
from tunesmith.kernels.linear_cross_entropy import linear_cross_entropy_sum
from tunesmith.model.decoder import Decoder
from tunesmith.model.language_model import LanguageModel
from tunesmith.model.layers import Linear
from tunesmith.model.transformers_backend import TransformersModel

Head = Callable[[Tensor], Tensor]


def trained_positions(targets_T: Tensor) -> tuple[Tensor, Tensor]:
    """Where a target is, and the targets there: both int64, found on the host so that the device never waits.

    targets_T: int64 [T] on the host, -100 where nothing is predicted.
    """
    index = torch.nonzero(targets_T != IGNORED).squeeze(1)
    return index, targets_T[index]


def head_of(model: LanguageModel) -> Tensor | Head:
    """What `cross_entropy_sum` takes as the head of this model: weight_VD of a plain one, else `model.logits`.

    Plain is a linear without bias, or the embedding where the head is tied to that.
    """
    if isinstance(model, TransformersModel):
        weight = model.plain_head()
        return model.logits if weight is None else weight
    if not isinstance(model, Decoder):
        return model.logits
    if model.head is None:
        return model.embedding.weight
    plain = type(model.head) is Linear and model.head.bias is None
    return model.head.weight if plain else model.logits


def cross_entropy_sum(
    hidden_TD: Tensor, index: Tensor, targets: Tensor, head: Tensor | Head, chunk_tokens: int
) -> Tensor:
    """The sum of -log softmax(head(hidden))[target] over the trained positions: a float32 scalar.

    At most chunk_tokens x V logits exist at once. The softmax is in float32 whatever the head's dtype. A head given by
    its weight is applied once, gradients included; any other is applied again in the backward pass.

    Args:
        index: the trained positions, int64 on the device.
        targets: the token at each of them.
        head: weight_VD of a linear head (see `head_of`), or a function from hidden states to logits.
    """
    if isinstance(head, Tensor):
        return linear_cross_entropy_sum(hidden_TD, head, targets, chunk_tokens, index)
    chosen = hidden_TD.index_select(0, index)
    total = torch.zeros((), dtype=torch.float32, device=hidden_TD.device)
    if index.numel() == 0:
        # Keeps the graph, so that a micro-batch without targets contributes a zero gradient.
        return total + chosen.sum().float()
    for part, part_targets in zip(chosen.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
        total = total + _chunk_loss(part, part_targets, head)
    return total


def _chunk_loss(hidden_TD: Tensor, targets_T: Tensor, head: Head) -> Tensor:
    if not torch.is_grad_enabled():
        return _head_loss(hidden_TD, targets_T, head)
    return cast(Tensor, checkpoint(_head_loss, hidden_TD, targets_T, head, use_reentrant=False))


def _head_loss(hidden_TD: Tensor, targets_T: Tensor, head: Head) -> Tensor:
    return F.cross_entropy(head(hidden_TD).float(), targets_T, reduction="sum")
