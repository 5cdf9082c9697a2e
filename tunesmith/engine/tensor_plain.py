"""A plain pass over a model that processes share: no pages, whole documents, as training and evaluation run it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tunesmith.model.decoder import Decoder
from tunesmith.model.packed import pack_documents


def plain_hidden(decoder: Decoder, documents: Sequence[Sequence[int]]) -> Tensor:
    """hidden_TD after the final norm, of all documents below each other, each attending to itself only.

    All processes call it together. Only the lengths count in all but the first, whose embeddings go to all.
    """
    with torch.no_grad():
        return decoder.hidden(pack_documents([list(document) for document in documents], _device(decoder)))


def _device(decoder: Decoder) -> torch.device:
    return decoder.embedding.weight.device
