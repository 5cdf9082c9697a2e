"""What a run does side by side before its first step: data beside weights, weights beside kernels."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from tunesmith.checkpoint.source import resolve_model
from tunesmith.model.autograd_threads import wake_autograd
from tunesmith.model.uncompiled import gradients
from tunesmith.recipe.schema import Recipe
from tunesmith.train.resolve import DTYPES

Made = TypeVar("Made")
_log = logging.getLogger(__name__)
_MOST_OF_MEMORY = 0.25
"""The share of a GPU's free memory up to which weights may be there while the certificate is made: its models and
tensors take some gigabytes at the widths of a 7B model."""
_WARM_WIDTH = 64
_STOPS_WITHIN_S = 2.0


class StoppedError(Exception):
    """Nobody wants what is being made any more."""


class Beside(Generic[Made]):
    """Something made in a thread while the main thread does something else; a context manager, which stops it.

    Args: make: called with a function that it calls now and then, and that raises where nobody wants the result.
    """

    def __init__(self, make: Callable[[Callable[[], None]], Made], name: str) -> None:
        self._make = make
        self._made: list[Made] = []
        self._error: BaseException | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def __enter__(self) -> Beside[Made]:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(_STOPS_WITHIN_S)

    def take(self) -> Made:
        """What was made, waited for. Raises: what making it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._made[0]

    def _work(self) -> None:
        try:
            self._made.append(self._make(self._look))
        except BaseException as error:
            self._error = error

    def _look(self) -> None:
        if self._stopping.is_set():
            raise StoppedError


def loads_first(recipe: Recipe) -> bool:
    """Whether a resolved recipe's weights are loaded before the certificate is made, while kernels are compiled.

    They are where they leave the certificate room on the GPU, and are copied as they lie: quantising them takes
    kernels that may not be compiled yet. With `train.deterministic` the checks come before torch is told so.
    """
    model = recipe.model
    if not model.device.startswith("cuda") or model.weights == "random" or model.backend == "transformers":
        return False
    if recipe.method.quantisation is not None or recipe.train.deterministic:
        return False
    free, _ = torch.cuda.mem_get_info(torch.device(model.device))
    return held_bytes(recipe) <= _MOST_OF_MEMORY * free


def held_bytes(recipe: Recipe) -> int:
    """About what the weights of a resolved recipe take on the device; files hold two bytes a value."""
    directory = resolve_model(recipe.model.path, recipe.model.revision)
    stored = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    return stored * DTYPES[recipe.model.dtype].itemsize // 2


def warm_device(recipe: Recipe) -> None:
    """Have the libraries of matrix products and attention loaded, and their handles made, while weights come.

    A handle is a thread's, and goes on to another when the thread ends; backward passes have a thread of their own.
    Nothing on a CPU. What fails here fails again where it is needed, with the words for it.
    """
    device = torch.device(recipe.model.device)
    if device.type != "cuda":
        return
    dtype = DTYPES[recipe.train.precision]
    with torch.cuda.device(device):
        for warm in (_multiply, _attend):
            try:
                warm(dtype, device)
            except RuntimeError:
                _log.debug("%s failed ahead of the first step", warm.__name__, exc_info=True)


def _multiply(dtype: torch.dtype, device: torch.device) -> None:
    wake_autograd(device)
    x = torch.zeros(_WARM_WIDTH, _WARM_WIDTH, dtype=dtype, device=device, requires_grad=True)
    y = x @ x
    gradients(y, [x], torch.zeros_like(y))


def _attend(dtype: torch.dtype, device: torch.device) -> None:
    """cuDNN's attention by its operator: the switches that choose a kernel are the whole process's."""
    if dtype == torch.float32 or torch.cuda.get_device_capability(device) < (8, 0):
        return
    x = torch.zeros(1, 1, _WARM_WIDTH, _WARM_WIDTH, dtype=dtype, device=device, requires_grad=True)
    y = torch.ops.aten._scaled_dot_product_cudnn_attention(x, x, x, None, True, 0.0, True)[0]
    gradients(y, [x], torch.zeros_like(y))
