"""Which shapes of whole prompts are counted as coming again."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch

from tunesmith.kernels import paged_attention_fresh as fresh

CPU = torch.device("cpu")


def test_only_shapes_that_come_again_soon_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug: every length that a server ever saw was counted for good, until each had a plan of cuDNN's, kept too."""
    monkeypatch.setattr(fresh, "_seen", OrderedDict())
    monkeypatch.setattr(fresh, "_fits", lambda *_: True)
    for length in range(2000, 2000 + 2 * fresh.REMEMBERED):
        for lengths in ([4096, 4096], [length]):
            assert fresh.pays_fresh(lengths, 28, 128, torch.bfloat16, CPU)
    assert len(fresh._seen) == fresh.REMEMBERED
    assert fresh._seen[torch.bfloat16, 28, 128, 2, 4096] == 2 * fresh.REMEMBERED
    assert (torch.bfloat16, 28, 128, 1, 2000) not in fresh._seen


def test_short_and_uneven_prompts_do_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fresh, "_fits", lambda *_: True)
    monkeypatch.setattr(fresh, "_seen", OrderedDict())
    for lengths in ([], [fresh.LEAST_TOKENS - 1], [3000, 3001, 3002, 3003]):
        assert not fresh.pays_fresh(lengths, 28, 128, torch.bfloat16, CPU)
    assert not fresh._seen


def test_a_plan_that_is_hidden_comes_with_the_second_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fresh, "_seen", OrderedDict())
    monkeypatch.setattr(fresh, "_fits", lambda *_: True)
    for step_s, wanted in ((0.2, 2), (0.01, fresh.SEEN + 1)):
        fresh._seen.clear()
        times = 0
        while fresh._seen.get((torch.bfloat16, 28, 128, 4, 2048), 0) <= fresh.SEEN:
            assert fresh.pays_fresh([2048] * 4, 28, 128, torch.bfloat16, CPU, step_s)
            times += 1
        assert times == wanted


def test_the_library_is_loaded_beside_what_is_done_and_no_failure_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, loaded = torch.device("cuda"), []
    monkeypatch.setattr(fresh, "_warm", lambda *given: loaded.append(given))
    monkeypatch.setattr(fresh, "_fits", lambda *_: True)
    with fresh.warming_fresh(4, 2, 16, torch.bfloat16, CPU):
        pass
    assert not loaded
    with pytest.raises(ValueError, match="mine"), fresh.warming_fresh(4, 2, 16, torch.bfloat16, gpu):
        raise ValueError("mine")
    assert loaded == [(4, 2, 16, torch.bfloat16, gpu)]
