"""The logits that the engine's own path gives, without choosing tokens: for comparing it with other paths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tunesmith.engine.batching import BatchBuilder
from tunesmith.engine.config import EngineConfig
from tunesmith.engine.pages import pages_of
from tunesmith.engine.prefix import PageChain
from tunesmith.engine.request import Request, SamplingParams
from tunesmith.engine.runner import NativeRunner
from tunesmith.engine.scheduler import Scheduled, StepPlan
from tunesmith.engine.sequence import Sequence as Running
from tunesmith.engine.text import AnswerText
from tunesmith.model.decoder import Decoder


def probe_runner(model: Decoder, max_model_len: int, *, max_num_seqs: int = 1, **options: object) -> NativeRunner:
    """A runner for a few sequences of at most `max_model_len` tokens. options: other fields of EngineConfig."""
    config = EngineConfig(
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs * max_model_len,
        **options,  # type: ignore[arg-type]
    )
    return NativeRunner(model, config, num_pages=max_num_seqs * pages_of(max_model_len))


def stepwise_logits(runner: NativeRunner, ids: Sequence[int], cuts: Sequence[int]) -> Tensor:
    """logits_CV after each cut, when ids[:cut] enter the cache piece by piece.

    cuts = range(1, T + 1) is pure decoding, [T] is one prefill. The runner's pages are free afterwards.
    """
    params = SamplingParams(max_tokens=1)
    request = Request(0, tuple(ids), params, 1, 0.0)
    sequence = Running(request, AnswerText(None, ()), frozenset(), 0, PageChain(), list(ids))
    sequence.pages = [runner.pages.take() for _ in range(pages_of(len(ids)))]
    sequence.enter(0)
    builder = BatchBuilder(runner.config.max_num_seqs, runner.max_model_len, runner.device)
    rows = []
    for start, stop in zip([0, *cuts], cuts, strict=False):
        plan = StepPlan([Scheduled(sequence, start, stop - start, samples=True)])
        batch, _ = builder.build(plan, runner.fixed_rows)
        rows.append(runner.step_logits(batch))
    runner.pages.release_all(sequence.pages)
    return torch.cat(rows)
