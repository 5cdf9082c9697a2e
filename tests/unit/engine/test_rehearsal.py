"""The step before the first one: what it launches is what a step of prompts launches, and it leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.engine.test_launches import CONFIG
from tunesmith.checkpoint.inference import load_for_inference
from tunesmith.engine import rehearsal
from tunesmith.engine.batching import many_prompts
from tunesmith.engine.config import EngineConfig
from tunesmith.engine.loading import make_config
from tunesmith.engine.rehearsal import head_rows, rehearse, step_bytes
from tunesmith.engine.runner import NativeRunner


def runner_of(path: Path, **changes: Any) -> NativeRunner:
    (path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    model: Any = load_for_inference(str(path), device="cpu", dtype="float32", weights="random")
    config = make_config(model, max_model_len=256, max_num_batched_tokens=512, max_num_seqs=20, **changes)
    return NativeRunner(model, config, num_pages=4)


def test_a_step_is_drawn_and_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = runner_of(tmp_path)
    for page in (*runner.cache.keys, *runner.cache.values):
        page.zero_()
    steps: list[tuple[int, int]] = []
    forward = runner.forward

    def counted(batch: Any) -> None:
        steps.append((batch.num_tokens, batch.num_requests))
        forward(batch)

    monkeypatch.setattr(runner, "forward", counted)
    rehearsal._step(runner)
    rehearsal._heads(runner)
    assert steps == [(np.diff(many_prompts(runner.config).starts).sum(), 2)]
    assert not any(page.any() for page in (*runner.cache.keys, *runner.cache.values))
    assert not runner.sampling.state._entered
    assert runner.pages.num_used == 0


def test_on_a_cpu_nothing_is_rehearsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = runner_of(tmp_path)
    monkeypatch.setattr(rehearsal, "_step", lambda runner: pytest.fail("a step ran"))
    rehearse(runner)


@pytest.mark.parametrize("most", [1, 2, 63, 64, 65, 256, 1000])
def test_the_head_meets_every_number_of_few_rows_and_the_most(most: int) -> None:
    rows = head_rows(most)
    assert rows[0] == 1 and rows[-1] == most and len(set(rows)) == len(rows)
    assert max(np.diff([0, *rows])) <= 4
    assert set(range(1, min(most, 64) + 1)) <= set(rows)


@pytest.mark.parametrize(("tokens", "seqs", "longest"), [(8192, 256, 4096), (1024, 1, 64), (256, 256, 4096), (7, 3, 2)])
def test_the_step_is_full_of_prompts_of_several_lengths(tokens: int, seqs: int, longest: int) -> None:
    config = EngineConfig(max_model_len=longest, max_num_seqs=seqs, max_num_batched_tokens=tokens)
    host = many_prompts(config)
    counts = np.diff(host.starts)
    assert counts.min() >= 1 and counts.max() <= longest and counts.sum() <= tokens
    assert len(counts) <= seqs
    assert (host.slots == -1).all()
    wide = 8 * sum(a.size for a in (host.tokens, host.positions, host.slots, host.sample_rows)) + 16 * len(counts)
    assert wide + 4 * (host.starts.size + host.contexts.size + host.tables.size) <= step_bytes(config)
    if tokens == 8192:
        assert len(set(counts.tolist())) > 8 and counts.sum() > 0.97 * tokens
