"""The safetensors files of a model directory, memory-mapped. Pickle is never read."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tunesmith.checkpoint.staging import DTYPES, Box, StagedTensors, Stored, staging_pays, stored_tensors
from tunesmith.errors import ModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class WeightFiles:
    """Tensors of one directory by name, sharded or not; each is read when asked for, straight to `device`."""

    def __init__(self, directory: Path, device: torch.device | str = "cpu") -> None:
        self.directory = directory
        self.device = str(device)
        self._handles: dict[Path, Any] = {}
        self._staged: StagedTensors | None = None
        self._places = _places(directory, self._open)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def names(self) -> list[str]:
        """The names of all tensors, sorted."""
        return sorted(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor as the file has it, without reading it."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype | None:
        """The dtype of a floating-point tensor, None for any other."""
        return DTYPES.get(self._slice(name).get_dtype())

    def read(self, name: str) -> Tensor:
        """The tensor on the device, in the file's dtype."""
        if self._staged is not None and name in self._staged:
            return self._staged.read(name)
        with self._torn(name):
            return self._open(self._places[name]).get_tensor(name)

    def read_box(self, name: str, box: Box) -> Tensor:
        """Some rows and columns of a matrix on the device, in the file's dtype; nothing else is read."""
        if self._staged is not None and _boxed(name, box) in self._staged:
            return self._staged.read(_boxed(name, box))
        if box == tuple((0, size) for size in self.shape(name)):
            return self.read(name)
        (top, bottom), (left, right) = box
        with self._torn(name):
            found: Tensor = self._slice(name)[top:bottom, left:right]
            return found

    @contextlib.contextmanager
    def reading_ahead(self, names: Sequence[str], boxes: Mapping[str, Sequence[Box]] | None = None) -> Iterator[None]:
        """Within this context these tensors are read in the background, in this order, each once, if to a GPU.

        boxes: of tensors that are not read whole, the parts in order.
        """
        device = torch.device(self.device)
        if not staging_pays(device):
            yield
            return
        held = {path: stored_tensors(path) for path in {self._places[name] for name in names}}
        stored: dict[str, Stored] = {}
        for name in (name for name in names if name in held[self._places[name]]):
            place = held[self._places[name]][name]
            if boxes is None or name not in boxes:
                stored[name] = place
            else:
                stored |= {_boxed(name, box): place.part(box) for box in boxes[name]}
        with StagedTensors(stored, device) as self._staged:
            try:
                yield
            finally:
                self._staged = None

    def _slice(self, name: str) -> Any:
        with self._torn(name):
            return self._open(self._places[name]).get_slice(name)

    @contextlib.contextmanager
    def _torn(self, name: str) -> Iterator[None]:
        try:
            yield
        except SafetensorError as error:
            raise ModelError(f"{self._places[name]} does not hold {name} whole ({error}): download it again") from None

    def _open(self, path: Path) -> Any:
        if path not in self._handles:
            try:
                self._handles[path] = safe_open(path, framework="pt", device=self.device)
            except FileNotFoundError:
                raise ModelError(f"{path} is missing: download the model directory again") from None
            except SafetensorError as error:
                raise ModelError(f"{path} is torn or no safetensors file ({error}): download it again") from None
        return self._handles[path]


def _boxed(name: str, box: Box) -> str:
    """What a part of a tensor is called while it is read ahead."""
    return f"{name}{[*box]}"


def _places(directory: Path, open_file: Any) -> dict[str, Path]:
    """Tensor name -> file, from the index where there is one."""
    index = directory / INDEX
    if index.is_file():
        return _indexed(directory, index)
    path = directory / SINGLE
    if not path.is_file():
        raise _no_weights(directory)
    return dict.fromkeys(open_file(path).keys(), path)


def _indexed(directory: Path, index: Path) -> dict[str, Path]:
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        named = {str(name): str(file) for name, file in places.items()}
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is no safetensors index with a weight_map: {error!r}") from None
    outside = sorted({file for file in named.values() if Path(file).name != file})
    if outside:
        raise ModelError(f"{index} names files outside its directory: {outside[0]!r}")
    return {name: directory / file for name, file in named.items()}


def _no_weights(directory: Path) -> ModelError:
    pickles = sorted(p.name for p in directory.glob("*.bin")) + sorted(p.name for p in directory.glob("*.pt*"))
    if pickles:
        return ModelError(
            f"{directory} holds pickled weights only ({pickles[0]}), which may run code when read and so never are; "
            f"it needs {SINGLE} or {INDEX}: take a revision with safetensors, or convert it with "
            f"transformers' save_pretrained"
        )
    return ModelError(f"{directory} holds no weights: expected {SINGLE} or {INDEX}, or set model.weights to 'random'")
