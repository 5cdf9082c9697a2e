"""Weights that are drawn where they are wanted: for measuring, and for training from nothing."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from tunesmith.arch import ModelConfig
from tunesmith.checkpoint.names import TensorName
from tunesmith.checkpoint.own_part import Boxes
from tunesmith.parallel.own_boxes import Rectangle


class RandomWeights:
    """Weights drawn on the device: normal(0, initializer_range), norms 1, biases 0."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device | str, seed: int) -> None:
        self.dtype = dtype
        self.std = config.initializer_range
        self.generator = torch.Generator(device).manual_seed(seed)

    def check(self, wanted: list[TensorName]) -> None:
        """Random weights fit any decoder."""

    def reading_ahead(self, wanted: Sequence[TensorName], boxes: Boxes | None = None) -> AbstractContextManager[None]:
        """There is nothing to read."""
        return nullcontext()

    def reads_boxes(self, item: TensorName) -> bool:
        """What a part holds depends on all that was drawn before: tensors are drawn whole."""
        return False

    def read_box(self, item: TensorName, box: Rectangle) -> Tensor:
        """Some rows and columns of a fresh tensor [out, in]."""
        return self.read(item)[slice(*box[0]), slice(*box[1])]

    def read(self, item: TensorName) -> Tensor:
        """A fresh tensor as [out, in]."""
        shape = tuple(reversed(item.shape)) if item.transposed else item.shape
        tensor = torch.empty(shape, dtype=self.dtype, device=self.generator.device)
        if item.kind == "bias":
            return tensor.zero_()
        if item.part is None and len(shape) == 1:
            return tensor.fill_(1.0)
        return tensor.normal_(0.0, self.std, generator=self.generator)
