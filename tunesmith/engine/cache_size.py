"""How many pages the cache gets: all that memory allows on a GPU, what requests can use on a CPU."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from tunesmith.arch import ModelConfig
from tunesmith.engine.config import EngineConfig
from tunesmith.engine.pages import page_bytes, pages_of
from tunesmith.errors import DeviceError
from tunesmith.hardware import available_memory_bytes
from tunesmith.units import format_bytes

log = logging.getLogger(__name__)
CPU_FREE_SHARE = 0.25
"""Of a machine's free memory, what pages may take."""


def kv_torch_dtype(config: EngineConfig, stream: torch.dtype) -> torch.dtype:
    """The dtype that keys and values are held in."""
    return torch.float8_e4m3fn if config.kv_dtype == "fp8" else stream


def num_pages(
    config: EngineConfig,
    model: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    worst_pass: Callable[[], None],
    beside_bytes: int = 0,
    graph_bytes: Callable[[], int] | None = None,
) -> int:
    """Pages for this engine: never more than all its requests can fill.

    On a GPU, what is left of `gpu_memory_utilization` x its memory beside weights, what else is held there, and the
    activations of the largest pass: `worst_pass` runs it, and its peak is measured; and beside what recorded steps will
    take, which `graph_bytes` measures. On a CPU, CPU_FREE_SHARE of the memory that is available now, but at least one
    request's: what is never written is never taken from the machine.
    beside_bytes: what another cache takes for each of these pages.
    Raises: DeviceError where not even one request of max_model_len tokens fits on the GPU.
    """
    one = pages_of(config.max_model_len)
    size = page_bytes(model, dtype) + beside_bytes
    if device.type == "cuda":
        free = _free_on_gpu(config, device, worst_pass, graph_bytes)
        if free < one * size:
            raise DeviceError(
                f"the cache needs {format_bytes(one * size)} for one request of {config.max_model_len} tokens, and "
                f"{format_bytes(max(free, 0))} are left for it: choose a smaller max_model_len, a higher "
                f"gpu_memory_utilization or kv_cache_dtype='fp8'"
            )
    else:
        free = max(int(available_memory_bytes() * CPU_FREE_SHARE), one * size)
    chosen = min(config.max_num_seqs * one, free // size)
    log.debug("key/value cache: %d pages, %s", chosen, format_bytes(chosen * size))
    return chosen


def _free_on_gpu(
    config: EngineConfig, device: torch.device, worst_pass: Callable[[], None], graph_bytes: Callable[[], int] | None
) -> int:
    """Bytes that pages may take."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    worst_pass()
    torch.cuda.synchronize(device)
    activations = torch.cuda.max_memory_allocated(device) - before
    # What the pass took is still reserved, so that steps run before they are recorded take nothing new of the device.
    graphs = 0 if graph_bytes is None else graph_bytes()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    budget = int(total * config.gpu_memory_utilization) - (total - free)
    log.info("activations: %s, recorded steps: %s", format_bytes(activations), format_bytes(graphs))
    return budget - activations - graphs
