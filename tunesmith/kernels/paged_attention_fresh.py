"""Causal attention of whole prompts that have nothing in the cache: over the new keys themselves, not over pages.

cuDNN's kernel takes prompts of one length as a batch, each run of them in one call: twice the speed of going over pages
(7B's heads on an H200: 515 TFLOP/s against 252). It builds a plan for every new shape, so only shapes that come again
are given to it; others go through torch's FlashAttention 2, which has no plans.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from threading import Thread

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.kernels.chip import chip_of, is_gpu, known_by_chip

log = logging.getLogger(__name__)
MOST_RUNS = 3
"""Calls for one layer: more cost the host more than the device saves."""
LEAST_TOKENS = 1024
"""Tokens of a call, on average."""
SEEN = 8
"""Times that a shape goes without a plan before one is built for it, where the device has to wait for it."""
PLAN_S = 0.045
"""What a plan takes the host: nothing, where the step before keeps the device busy for longer."""
REMEMBERED = 256
"""Shapes whose times are counted: of a server's many lengths each comes again some day, and plans are kept for good."""
_FIRST_CAPABILITY = (9, 0)
_WIDEST_HEAD = 128
_Shape = tuple[torch.dtype, int, int, int, int]
_seen: OrderedDict[_Shape, int] = OrderedDict()
_refused: set[_Shape] = set()


def even_runs(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """(number of prompts, their length) of neighbours of one length, in order."""
    return [(len(list(run)), length) for length, run in groupby(lengths)]


def pays_fresh(
    lengths: Sequence[int],
    num_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    step_s: float = 0.0,
) -> bool:
    """Whether `attend_fresh` is there for prompts of these lengths, and faster. Counts how often their shapes came.

    step_s: about what such a step takes the device. Where that hides a plan, a shape has one from its second time on.
    """
    if not fits_fresh(lengths, head_dim, dtype, device):
        return False
    for run in even_runs(lengths):
        _see((dtype, num_heads, head_dim, *run), SEEN if step_s > PLAN_S else 1)
    return True


def fits_fresh(lengths: Sequence[int], head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """What `pays_fresh` says, without counting anything."""
    runs = even_runs(lengths)
    if not runs or len(runs) > MOST_RUNS or sum(lengths) < LEAST_TOKENS * len(runs):
        return False
    return _fits(dtype, head_dim, device)


def _see(shape: _Shape, times: int) -> None:
    """A shape came again; those that did not come for longest are forgotten."""
    _seen[shape] = _seen.pop(shape, 0) + times
    while len(_seen) > REMEMBERED:
        _seen.popitem(last=False)


def attend_fresh(query_TNH: Tensor, key_TKH: Tensor, value_TKH: Tensor, lengths: Sequence[int], out: Tensor) -> None:
    """Write out_TNH: every prompt's tokens over the same prompt's tokens up to their own.

    Args: strides of tokens and heads are free. lengths: of the prompts, one behind the other; T in all.
    """
    first = 0
    for run in even_runs(lengths):
        rows = slice(first, first + run[0] * run[1])
        query, key, value = (t[rows].unflatten(0, run).transpose(1, 2) for t in (query_TNH, key_TKH, value_TKH))
        shape = (query.dtype, query.shape[1], query.shape[3], *run)
        out[rows].unflatten(0, run).copy_(_dense(query, key, value, shape).transpose(1, 2))
        first = rows.stop


def _dense(query_BNLH: Tensor, key_BKLH: Tensor, value_BKLH: Tensor, shape: _Shape) -> Tensor:
    """Prompts of one length. On a GPU by operators: the switches that choose one are the whole process's."""
    given = (query_BNLH, key_BKLH, value_BKLH)
    if not query_BNLH.is_cuda:
        return F.scaled_dot_product_attention(*given, is_causal=True, enable_gqa=True)
    found: Tensor
    if _seen.get(shape, 0) > SEEN and shape not in _refused and shape[3] * shape[4] >= LEAST_TOKENS:
        try:
            found = torch.ops.aten._scaled_dot_product_cudnn_attention(*given, None, False, 0.0, True)[0]
            return found
        except RuntimeError as error:
            _refused.add(shape)
            log.warning("cuDNN has no attention for %s, FlashAttention 2 is used: %s", shape, error)
    found = torch.ops.aten._scaled_dot_product_flash_attention(*given, 0.0, True)[0]
    return found


@contextmanager
def warming_fresh(
    num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> Iterator[None]:
    """cuDNN's library is loaded for these heads by a thread beside what is done in here, and is there at its end.

    The first plan of a process took 0.75 s on an H200 where nothing of the library was in memory, later ones 35 ms.
    """
    if device.type != "cuda" or not _fits(dtype, head_dim, device):
        yield
        return
    thread = Thread(target=_warm, args=(num_heads, num_kv_heads, head_dim, dtype, device), daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _warm(num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """One prompt. What fails here fails again where it is needed, with the words for it."""
    try:
        with torch.inference_mode(), torch.cuda.device(device):
            query, key = (
                torch.zeros(1, n, LEAST_TOKENS, head_dim, dtype=dtype, device=device) for n in (num_heads, num_kv_heads)
            )
            torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, key, None, False, 0.0, True)
    except RuntimeError:
        log.debug("cuDNN's attention failed ahead of the first prompt", exc_info=True)


@known_by_chip
def _fits(dtype: torch.dtype, head_dim: int, device: torch.device) -> bool:
    """Whether both kernels are there, and known to be faster: since Hopper."""
    if not is_gpu(device) or dtype not in (torch.float16, torch.bfloat16) or head_dim % 8 or head_dim > _WIDEST_HEAD:
        return False
    if device.type == "cuda" and not _has_libraries():
        return False
    chip = chip_of(device)
    return chip is not None and chip.capability >= _FIRST_CAPABILITY


def _has_libraries() -> bool:
    return torch.backends.cudnn.is_available() and torch.backends.cuda.is_flash_attention_available()
