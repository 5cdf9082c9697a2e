"""The GPU that kernels are for: the one that a tensor is on, or one that is foreseen, for tensors of the meta device.

What is taken down on the meta device (`warm_up.recorded`) is compiled for a GPU, and how it is cut depends on that GPU.
`foreseeing` names it, so that a process that never touches a GPU, or has none, takes down what a GPU would launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar, cast

import torch

Known = TypeVar("Known", bound=Callable[..., Any])
_foreseen: Chip | None = None
_stand_in = "meta"
_forget: list[Callable[[], None]] = []


@dataclass(frozen=True)
class Chip:
    """A GPU as far as launches depend on it. num_processors: its streaming multiprocessors."""

    capability: tuple[int, int]
    num_processors: int


@contextmanager
def foreseeing(chip: Chip, stand_in: str = "meta") -> Iterator[None]:
    """In here devices of this type stand for this GPU."""
    global _foreseen, _stand_in
    before = _foreseen, _stand_in
    _foreseen, _stand_in = chip, stand_in
    _forget_all()
    try:
        yield
    finally:
        _foreseen, _stand_in = before
        _forget_all()


def known_by_chip(function: Known) -> Known:
    """`functools.cache` for what is asked of a device; what was known is forgotten where another chip is foreseen."""
    cached: Any = cache(function)
    _forget.append(cached.cache_clear)
    return cast(Known, cached)


def is_gpu(device: torch.device) -> bool:
    """Whether this is a GPU, or stands for one."""
    return device.type == "cuda" or stands_in(device)


def stands_in(device: torch.device) -> bool:
    """Whether this stands for a GPU that is foreseen."""
    return _foreseen is not None and device.type == _stand_in


def chip_of(device: torch.device) -> Chip | None:
    """The GPU that a device is or stands for. The meta device stands for the one that is there, where none is foreseen.

    None: no GPU. It may start CUDA.
    """
    if stands_in(device):
        return _foreseen
    if device.type not in ("cuda", "meta") or not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(device if device.type == "cuda" else None)
    return Chip((properties.major, properties.minor), properties.multi_processor_count)


def _forget_all() -> None:
    for forget in _forget:
        forget()
