"""Decoders for inference: linears in int8 or int4, quantised one projection at a time as the weights arrive.

As `load.fill_decoder`, for formats that are not trained: the decoder is made on the meta device, its linears replaced
there, given storage, and filled; there is never more than the held weights and one projection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from tunesmith.arch import ModelConfig, read_config
from tunesmith.checkpoint.files import WeightFiles
from tunesmith.checkpoint.load import DTYPES, CheckpointWeights, RandomWeights
from tunesmith.checkpoint.names import TensorName, tensor_names
from tunesmith.checkpoint.own_part import Boxes
from tunesmith.model.decoder import Decoder
from tunesmith.model.uncompiled import import_kernels
from tunesmith.model.weight_formats import WeightFormat, hold_linears
from tunesmith.parallel.own_boxes import Rectangle


class HeldSource(Protocol):
    """Where tensors come from, by our names; quantised ones in the form that the linear's `load_part` takes over."""

    @property
    def dtype(self) -> torch.dtype:
        """What weights are stored in."""

    def check(self, wanted: list[TensorName]) -> None:
        """Refuse what does not fit."""

    def reading_ahead(self, wanted: Sequence[TensorName], boxes: Boxes | None = None) -> AbstractContextManager[None]:
        """Read in this order in the background, where that is faster. boxes: of tensors that are read in part."""

    def read(self, item: TensorName) -> Any:
        """One tensor as [out, in]."""

    def reads_boxes(self, item: TensorName) -> bool:
        """Whether a part of this tensor can be read without the rest."""

    def read_box(self, item: TensorName, box: Rectangle) -> Tensor:
        """Some rows and columns of [out, in]."""


def load_quantized(
    directory: Path,
    held: WeightFormat,
    *,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    weights: Literal["checkpoint", "random"] = "checkpoint",
    seed: int = 0,
) -> Decoder:
    """The decoder of an unquantised model directory, the linears of its blocks quantised as they arrive.

    Raises: ModelError, UnsupportedModelError for a family that the decoder does not have.
    """
    config = read_config(directory)
    if weights == "random":
        named = DTYPES.get(str(config.raw.get("dtype") or config.raw.get("torch_dtype")), torch.float32)
        source: CheckpointWeights | RandomWeights = RandomWeights(config, dtype or named, device, seed)
    else:
        source = CheckpointWeights(WeightFiles(directory, device), config)
    return fill_held(config, source, dtype or source.dtype, device, lambda decoder: hold_linears(decoder, held))


def fill_held(
    config: ModelConfig,
    source: HeldSource,
    dtype: torch.dtype,
    device: torch.device | str,
    replace_linears: Callable[[Decoder], Any],
) -> Decoder:
    """A decoder on `device` whose linears `replace_linears` exchanged on the meta device, filled from `source`."""
    with torch.device("meta"):
        decoder = Decoder(config).to(dtype)
    wanted = list(tensor_names(decoder))
    source.check(wanted)
    replace_linears(decoder)
    _give_storage(decoder, device)
    with source.reading_ahead(wanted):
        if torch.device(device).type == "cuda":
            import_kernels()
        for (path, part), group in groupby(wanted, key=lambda item: (item.module, item.part)):
            _put(decoder.get_submodule(path), part, {item.kind: source.read(item) for item in group})
    return decoder.requires_grad_(False)


def _give_storage(module: nn.Module, device: torch.device | str) -> None:
    cast(Any, module)._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device))


@torch.no_grad()
def _put(module: nn.Module, part: str | None, tensors: Mapping[str, Any]) -> None:
    if part is not None:
        cast(Any, module).load_part(part, tensors["weight"], tensors.get("bias"))
        return
    for kind, tensor in tensors.items():
        getattr(module, kind).copy_(tensor)
