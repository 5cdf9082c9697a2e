"""Attention over pages by FlashInfer, where its package is installed.

A step is planned once for all layers, from lengths that the host knows (`HostLengths`): nothing is read back from the
device. plan() fills a pinned buffer and has it copied, so a buffer is filled anew only when that copy has ended. A plan
belongs to one step's lengths, so recorded steps, whose lengths change from replay to replay, are not for it.
Source: arXiv 2501.01005; signatures: flashinfer/decode.py and prefill.py of flashinfer-ai/flashinfer.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunesmith.kernels.paged_step import HostLengths, PagedHeads, PagedStep

NAME = "flashinfer"
PACKAGE, MODULE = "flashinfer-python", "flashinfer"
WORKSPACE_BYTES = 2**27
"""What the library recommends for partial results."""
PLANS = 4
"""Plans at a time of each kind: of two steps on their way, in two windows."""
_CHIPS = ((8, 0), (13, 0))
_HEAD_DIMS = (64, 128, 256)


def is_installed() -> bool:
    """Whether the package is there; nothing is imported."""
    return MODULE in sys.modules or find_spec(MODULE) is not None


@dataclass
class _Place:
    """A wrapper of the library's, and the step that it is planned for."""

    wrapper: Any
    step: PagedStep | None = None
    copied: torch.cuda.Event | None = None


class FlashInferAttention:
    """`BatchDecodeWithPagedKVCacheWrapper` for single tokens, `BatchPrefillWithPagedKVCacheWrapper` for others.

    Raises: ImportError.
    """

    name = NAME
    records = False

    def __init__(self) -> None:
        self._library: Any = importlib.import_module(MODULE)
        self.version = _version(self._library)
        self._places: dict[tuple[torch.device, bool], list[_Place]] = {}
        self._workspaces: dict[torch.device, Tensor] = {}

    def refused(self, heads: PagedHeads) -> str | None:
        """Processes that share a model are not told the lengths on the host."""
        if heads.is_shared:
            return "FlashInfer plans on the host, and processes that share a model have a step's lengths on the device"
        return heads.refused("FlashInfer", _CHIPS, _HEAD_DIMS)

    def serves(self, step: PagedStep) -> bool:
        """Where the host knows the lengths."""
        return step.host is not None

    def __call__(
        self,
        query_TNH: Tensor,
        keys_PSKH: Tensor,
        values_PSKH: Tensor,
        step: PagedStep,
        *,
        window: int | None,
        scale: float,
        out: Tensor | None = None,
    ) -> Tensor:
        """See `PagedKernel`."""
        known = (NAME, window, scale)
        place: _Place | None = step.plans.get(known)
        if place is None or place.step is not step:
            place = step.plans[known] = self._plan(query_TNH, keys_PSKH, step, window, scale)
        found: Tensor = place.wrapper.run(query_TNH, (keys_PSKH, values_PSKH), out=out)
        return found

    def _plan(self, query_TNH: Tensor, keys_PSKH: Tensor, step: PagedStep, window: int | None, scale: float) -> _Place:
        host, device = step.host, query_TNH.device
        assert host is not None, "a step that it serves"
        _, num_slots, num_kv_heads, head_dim = keys_PSKH.shape
        place = self._next_place(device, step.is_decode)
        heads = (query_TNH.shape[1], num_kv_heads, head_dim, num_slots)
        options = {
            "window_left": -1 if window is None else window - 1,
            "sm_scale": scale,
            "q_data_type": query_TNH.dtype,
            "kv_data_type": keys_PSKH.dtype,
        }
        pages = [_on_host(array, device) for array in _indices(host, num_slots)]
        if step.is_decode:
            place.wrapper.plan(*pages, *heads, **options)
        else:
            place.wrapper.plan(_on_host(host.starts, device), *pages, *heads, causal=True, **options)
        if place.copied is not None:
            place.copied.record()
        place.step = step
        return place

    def _next_place(self, device: torch.device, is_decode: bool) -> _Place:
        """The wrapper whose plan is oldest; where more are on their way than there are places, it is waited for."""
        places = self._places.setdefault((device, is_decode), [])
        if len(places) < PLANS:
            places.append(self._new_place(device, is_decode))
            return places[-1]
        place = places.pop(0)
        places.append(place)
        if place.copied is not None:
            place.copied.synchronize()
        return place

    def _new_place(self, device: torch.device, is_decode: bool) -> _Place:
        space = self._workspaces.get(device)
        if space is None:
            space = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
            self._workspaces[device] = space
        if is_decode:
            wrapper = self._library.BatchDecodeWithPagedKVCacheWrapper(space, "NHD", use_tensor_cores=True)
        else:
            wrapper = self._library.BatchPrefillWithPagedKVCacheWrapper(space, "NHD")
        return _Place(wrapper, copied=torch.cuda.Event() if device.type == "cuda" else None)


def _indices(host: HostLengths, num_slots: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each request's pages begin [R + 1], all pages one behind the other, the tokens of each last page [R]."""
    used = -(-host.contexts // num_slots)
    starts = np.append(0, np.cumsum(used))
    pages = host.tables[np.arange(host.tables.shape[1]) < used[:, None]]
    return starts, pages, host.contexts - (used - 1) * num_slots


def _on_host(array: np.ndarray, device: torch.device) -> Tensor:
    """int32; pinned where a GPU copies it, so that nobody waits for the copy."""
    made = torch.empty(array.shape, dtype=torch.int32, pin_memory=device.type == "cuda")
    made.numpy()[...] = array
    return made


def _version(module: Any) -> str:
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return str(getattr(module, "__version__", "unknown"))
