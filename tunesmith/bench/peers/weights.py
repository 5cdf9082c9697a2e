"""The same numbers in every runner: random weights and the adapters' first matrices, by Hugging Face's names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.arch import read_config
from tunesmith.checkpoint.load import RandomWeights
from tunesmith.checkpoint.names import TensorName, tensor_names
from tunesmith.model.decoder import Decoder
from tunesmith.model.lora import Adapter, AdapterOptions

_WRAPPERS = "base_model.model."


def names_of(directory: Path) -> list[TensorName]:
    """Every tensor of the model's checkpoint, in the order in which random ones are drawn."""
    with torch.device("meta"):
        return list(tensor_names(Decoder(read_config(directory))))


def random_tensors(
    directory: Path, dtype: torch.dtype, device: torch.device, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face's name and tensor of every weight, the very numbers that `load_decoder(weights="random")` draws.

    Shapes are the checkpoint's. One tensor is alive at a time.
    """
    source = RandomWeights(read_config(directory), dtype, device, seed)
    for item in names_of(directory):
        tensor = source.read(item)
        yield item.name, tensor.t().contiguous() if item.transposed else tensor


@torch.no_grad()
def fill(model: nn.Module, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Copy tensors into the parameters of their names. Raises: KeyError for a name that the model does not have."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors:
        parameters[name].copy_(tensor)


@torch.no_grad()
def start_adapters(model: nn.Module, directory: Path, options: AdapterOptions, seed: int) -> int:
    """Give PEFT's adapters the A that tunesmith starts the same projections with (B is zero in both).

    Returns: how many were set.
    """
    keys = {item.name.removesuffix(".weight"): f"{item.module}.{item.part}" for item in names_of(directory)}
    done = 0
    for path, module in model.named_modules():
        weights: Any = getattr(module, "lora_A", None)
        key = keys.get(path.removeprefix(_WRAPPERS))
        if not isinstance(weights, nn.ModuleDict) or key is None:
            continue
        weight: Any = weights["default"].weight
        weight.copy_(_first_matrix(key, weight.shape[1], options, seed))
        done += 1
    return done


def _first_matrix(key: str, in_features: int, options: AdapterOptions, seed: int) -> Tensor:
    """A [R, D] as a fresh adapter of tunesmith has it."""
    adapter = Adapter(in_features, 1, options)
    adapter.reset(key, seed)
    return adapter.A.detach()
