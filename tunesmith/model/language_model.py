"""What training, evaluation and the bench ask of a model: the native decoder and the transformers backend have it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from tunesmith.model.packed import PackedTokens


class LanguageModel(Protocol):
    """A causal language model over packed documents. Implementations are `nn.Module`s."""

    backend: Literal["native", "transformers"]
    compute_dtype: torch.dtype | None
    checkpointing: Literal["none", "block", "selective", "selective-qkv", "offload", "offload-block"]
    noise_alpha: float
    training: bool

    def hidden(self, pack: PackedTokens) -> Tensor:
        """hidden_TD after the final norm; no document sees another."""

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """logits_TV of hidden states."""

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...

    def train(self, mode: bool = True) -> LanguageModel: ...

    def eval(self) -> LanguageModel: ...


def logits(model: LanguageModel, documents: list[list[int]]) -> list[Tensor]:
    """The logits of several documents, one [T, V] tensor each, computed without gradients in one pack."""
    from tunesmith.model.packed import pack_documents

    device = next(iter(model.parameters())).device
    pack = pack_documents(documents, device)
    with torch.no_grad():
        return list(torch.split(model.logits(model.hidden(pack)), list(pack.lengths)))
