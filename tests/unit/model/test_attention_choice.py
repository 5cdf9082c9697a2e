"""Which kernel is taken: the fastest measured, for longer shapes the same, and none that was found to be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tunesmith.model import attention_choice, attention_store
from tunesmith.model.attention_choice import MOST_MEASURED, AttentionShape, choices, choose, leave_out

MILLISECONDS = {"varlen": 3.0, "dense-cudnn": 1.0, "dense-flash": 2.0}


def _kernel(name: str) -> attention_choice.Attention:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        raise AssertionError(name)

    return attend


KERNELS = {name: _kernel(name) for name in MILLISECONDS}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The kernels that were measured, each as long as MILLISECONDS says."""
    names = {kernel: name for name, kernel in KERNELS.items()}
    seen: list[str] = []

    def time(kernel: attention_choice.Attention, *_: Tensor) -> float:
        seen.append(names[kernel])
        return MILLISECONDS[names[kernel]]

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(attention_store, "store_path", lambda: tmp_path / "choices.json")
    monkeypatch.setattr(attention_choice, "_time", time)
    monkeypatch.setattr(attention_choice, "_chosen", {})
    monkeypatch.setattr(attention_choice, "_left_out", set())
    return seen


def _chosen(num_tokens: int) -> str:
    shape = AttentionShape("gpu", "bfloat16", 4, 2, 8, num_tokens, num_tokens, is_even=True, has_window=False)
    empty = torch.empty(0)
    kernel = choose(shape, KERNELS, empty, empty, empty)
    return next(name for name, other in KERNELS.items() if other is kernel)


def test_the_fastest_is_measured_once_and_taken_for_longer_shapes(measured: list[str]) -> None:
    assert [_chosen(64), _chosen(64), _chosen(MOST_MEASURED + 1)] == ["dense-cudnn"] * 3
    assert measured == list(MILLISECONDS)


def test_what_was_found_to_be_wrong_is_not_taken_again(measured: list[str]) -> None:
    assert [_chosen(64), _chosen(MOST_MEASURED + 1)] == ["dense-cudnn"] * 2
    assert leave_out("dense-cudnn")
    assert not leave_out("dense-cudnn")
    assert [_chosen(MOST_MEASURED + 1), _chosen(64), _chosen(32)] == ["dense-flash"] * 3
    assert measured == [*MILLISECONDS, "varlen", "dense-flash"]
    assert [known["kernel"] for known in choices()] == ["dense-flash"] * 3


def test_where_all_are_wrong_the_one_that_always_runs_is_left(measured: list[str]) -> None:
    for name in MILLISECONDS:
        leave_out(name)
    assert _chosen(MOST_MEASURED + 1) == "varlen"


def test_a_later_process_takes_what_was_kept(measured: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert _chosen(64) == "dense-cudnn"
    monkeypatch.setattr(attention_choice, "_chosen", {})
    assert _chosen(64) == "dense-cudnn"
    assert measured == list(MILLISECONDS)
    assert choices()[0]["milliseconds"] == MILLISECONDS
    # What was found to be wrong here is no candidate any more, so that choice was another one.
    monkeypatch.setattr(attention_choice, "_chosen", {})
    leave_out("dense-cudnn")
    assert _chosen(64) == "dense-flash"
