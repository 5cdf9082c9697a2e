"""Which Triton kernels an engine launches before and with its first answers, taken down on the meta device.

The engine's own runner over a decoder without storage: quantising as weights arrive, the passes that measure what
memory is left, decoding as graphs, sampling. Nothing is listed here but whose turn it is, so nothing can go stale.
Adapters, experts, and what only some requests ask for are compiled where they are launched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

from tunesmith.checkpoint.foreseen import foreseen_for_inference
from tunesmith.checkpoint.inference import inference_dtype
from tunesmith.checkpoint.source import resolve_model
from tunesmith.engine.asked import Asked
from tunesmith.engine.batch import SampledRow
from tunesmith.engine.batching import HostBatch, decode_batch, small_batches, to_device, worst_batches
from tunesmith.engine.config import EngineConfig
from tunesmith.engine.graphs import coarse, ladder
from tunesmith.engine.loading import make_config
from tunesmith.engine.request import SamplingParams
from tunesmith.engine.runner import NativeRunner
from tunesmith.engine.source import find_source
from tunesmith.kernels.chip import Chip, foreseeing
from tunesmith.kernels.warm_up import Launch, recorded
from tunesmith.model.decoder import Decoder


def launches_of(asked: Asked, chip: Chip) -> list[Launch]:
    """The launches of an engine's start on a GPU of this kind, and of its first steps. Empty for what is not native."""
    with foreseeing(chip):
        runners: list[NativeRunner] = []
        found = recorded(lambda: runners.append(_runner(asked)))
        for work in _turns(runners[-1]) if runners else ():
            found += recorded(work)
        return list({launch.key: launch for launch in found}.values())


def _runner(asked: Asked) -> NativeRunner:
    model = _model(asked)
    return NativeRunner(model, _config(model, asked), num_pages=1)


def _model(asked: Asked) -> Decoder:
    source = find_source(asked.model, asked.adapter, asked.quantize, asked.revision)
    return foreseen_for_inference(
        resolve_model(source.path, source.revision),
        quantize=source.quantize,
        dtype=inference_dtype(asked.dtype),
        weights=asked.weights,
        head=cast(Any, asked.head),
        one_head=asked.batch_invariant,
    )


def _config(model: Decoder, asked: Asked) -> EngineConfig:
    return make_config(
        model,
        max_model_len=asked.max_model_len,
        max_num_seqs=asked.max_num_seqs,
        max_num_batched_tokens=asked.max_num_batched_tokens,
        kv_dtype=asked.kv_cache_dtype,
        enforce_eager=asked.enforce_eager,
        batch_invariant=asked.batch_invariant,
    )


def _turns(runner: NativeRunner) -> list[Callable[[], object]]:
    """What happens one after the other; what ends early leaves the rest. What takes longest to compile comes first."""
    return [partial(_sampling, runner), runner.worst_pass, runner.warm_up, partial(_steps, runner)]


def _steps(runner: NativeRunner) -> None:
    """Steps as requests bring them, with tokens that are drawn: prompts, and decoding together, few and many."""
    config = runner.config
    decoding = [decode_batch(size, config.max_model_len) for size in coarse(ladder(config.max_num_seqs))]
    for host in [*small_batches(config), *worst_batches(config), *decoding]:
        _step(runner, host)


def _step(runner: NativeRunner, host: HostBatch) -> None:
    is_decode = len(host.tokens) == len(host.contexts)
    batch = to_device(replace(host, is_decode=is_decode), runner.device)
    params = SamplingParams(temperature=1.0)
    rows = [SampledRow(slot, params, 0, 1, (0,), frozenset()) for slot in batch.sequence_slots]
    runner.forward(batch)
    runner.sample(batch, rows, None)


def _sampling(runner: NativeRunner) -> None:
    """What an engine loads in its first idle moments."""
    while runner.sampling.warm_up(runner.stream_dtype):
        pass
