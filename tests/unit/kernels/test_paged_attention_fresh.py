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


def test_the_library_is_loaded_beside_what_is_done_and_no_failure_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, loaded = torch.device("cpu"), []
    monkeypatch.setattr(fresh, "_warm", lambda *given: loaded.append(given))
    with fresh.warming_fresh(4, 2, 16, torch.bfloat16, cpu):
        pass
    assert not loaded
    monkeypatch.setattr(fresh, "_fits", lambda *_: True)
    with pytest.raises(ValueError, match="mine"), fresh.warming_fresh(4, 2, 16, torch.bfloat16, cpu):
        raise ValueError("mine")
    assert loaded == [(4, 2, 16, torch.bfloat16, cpu)]
