"""A step of prompts before the first one that somebody waits for: what steps load or take for the first time.

A step of prompts leaves the device busy for ten milliseconds and more, so the host has time. But what waits for the
device takes all of that away: on an H200 three of eighteen such steps stood still for one or two steps in `sample`.
These may wait: memory of the device that torch does not hold yet (it gave all of it back when the pages were counted),
pinned memory, and the loading of a kernel's code, which CUDA leaves to its first launch. cuBLAS has kernels of its own
for nearly every number of rows that the head meets, and torch others for up to sixteen rows and for more.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tunesmith.engine.batch import SampledRow
from tunesmith.engine.batching import many_prompts, to_device
from tunesmith.engine.config import EngineConfig
from tunesmith.engine.moving import move, pin_ahead
from tunesmith.engine.pages import pages_of
from tunesmith.engine.request import SamplingParams
from tunesmith.engine.runner import NativeRunner, evaluating

log = logging.getLogger(__name__)
_ALL_UNTIL, _EVERY = 64, 4
_DRAWN = (1, 16, 17)
"""Numbers of rows that are drawn as well; and the most."""


def rehearse(runner: NativeRunner) -> None:
    """Run such a step on a GPU, and the head for every kind of number of rows. Nothing is written to the pages."""
    if runner.device.type != "cuda":
        return
    pin_ahead(step_bytes(runner.config), runner.device)
    try:
        _step(runner)
        _heads(runner)
    except torch.OutOfMemoryError:
        log.warning("no memory to rehearse a full step of prompts: the first ones may be slow")
        torch.cuda.empty_cache()


def step_bytes(config: EngineConfig) -> int:
    """What the largest batch takes on its way to the device, at most: numbers of tokens and of rows, and the tables."""
    wide = 5 * config.max_num_batched_tokens + 5 * config.max_num_seqs
    narrow = config.max_num_batched_tokens + config.max_num_seqs * (3 + pages_of(config.max_model_len))
    return 8 * wide + 4 * narrow


def head_rows(most: int) -> list[int]:
    """Numbers of rows for which the head is run: all while they are few, then every fourth, and the most."""
    return sorted({*range(1, min(most, _ALL_UNTIL) + 1), *range(_ALL_UNTIL, most, _EVERY), most})


def _step(runner: NativeRunner) -> None:
    batch = to_device(many_prompts(runner.config), runner.device)
    runner.forward(batch)
    pending = runner.sample(batch, _rows(batch.sequence_slots), None)
    pending.wait()
    _release(runner, batch.sequence_slots)


def _heads(runner: NativeRunner) -> None:
    most, width = runner.config.max_num_seqs, runner.model.config.hidden_size
    with torch.inference_mode(), evaluating(runner.model):
        hidden_TD = torch.zeros(most, width, dtype=runner.stream_dtype, device=runner.device)
        slots_T = move([np.arange(most)], runner.device)[0]
        for num in head_rows(most):
            logits_BV = runner.logits(hidden_TD.index_select(0, slots_T[:num]))
            if num in _DRAWN or num == most:
                _draw(runner, logits_BV, slots_T[:num])


def _draw(runner: NativeRunner, logits_BV: Tensor, slots_B: Tensor) -> None:
    slots = range(len(slots_B))
    runner.sampling(logits_BV, _rows(slots), slots_B, slots_B).to_host()
    _release(runner, slots)


def _rows(slots: Sequence[int]) -> list[SampledRow]:
    params = SamplingParams(temperature=1.0)
    return [SampledRow(slot, params, 0, 1, (0,), frozenset()) for slot in slots]


def _release(runner: NativeRunner, slots: Sequence[int]) -> None:
    for slot in slots:
        runner.release(slot)
