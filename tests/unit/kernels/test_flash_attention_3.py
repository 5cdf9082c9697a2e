"""FlashAttention-3 is called with the right tensors: a stand-in of its signature equals the reference."""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from attention_packages import FakeFlashAttention3, install
from paged_batches import make_batch

from tunesmith.kernels import flash_attention_3
from tunesmith.kernels.flash_attention_3 import FlashAttention3, is_installed
from tunesmith.kernels.paged_step import PagedHeads, PagedStep

HEADS = PagedHeads(28, 4, 128, torch.bfloat16, torch.bfloat16, 16, (None,), (9, 0))
STEPS = {
    "decode": ([1, 1, 1], [5, 40, 17]),
    "mixed": ([1, 20, 3, 1, 0], [5, 20, 40, 33, 7]),
    "drafts": ([3, 3], [30, 3]),
}


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> FakeFlashAttention3:
    return install(monkeypatch, FakeFlashAttention3())


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("heads", [(6, 2, 16), (4, 4, 8)], ids=str)
@pytest.mark.parametrize("kind", STEPS)
def test_equals_the_reference(kind: str, heads: tuple[int, int, int], window: int | None, package) -> None:
    batch = make_batch(*STEPS[kind], heads, torch.bfloat16)
    query = batch.query[: int(batch.starts[-1])]
    least = int(batch.starts.diff().min())
    step = PagedStep(batch.tables, batch.starts, batch.context, batch.max_query, batch.max_context, least)
    out = torch.empty_like(query)
    kernel = FlashAttention3()
    given = kernel(query, batch.keys, batch.values, step, window=window, scale=heads[2] ** -0.5, out=out)
    assert given is out
    torch.testing.assert_close(out, batch.truth(window))
    fresh = kernel(query, batch.keys, batch.values, step, window=window, scale=heads[2] ** -0.5)
    assert torch.equal(fresh, out)
    assert (package.calls[0]["cu_seqlens_q"] is None) == (kind == "decode") == bool(package.schedules)


def test_single_tokens_are_scheduled_once_for_all_layers_of_a_window(package) -> None:
    batch = make_batch([1, 1], [5, 40], (4, 2, 8), torch.bfloat16)
    step = PagedStep(batch.tables, batch.starts, batch.context, 1, 40)
    for window in (None, 7, None, 7):
        given = FlashAttention3()(batch.query[:2], batch.keys, batch.values, step, window=window, scale=8**-0.5)
        torch.testing.assert_close(given, batch.truth(window))
    assert len(package.schedules) == 2


def test_rows_and_columns_of_a_recorded_step(package) -> None:
    """Its tables are as wide as the longest context of all: what decides the parts is the bound of the recording."""
    batch = make_batch([1, 1, 1], [5, 40, 1], (4, 2, 8), torch.bfloat16)
    wide = torch.full((3, 64), -9, dtype=torch.int32)
    wide[:, : batch.tables.shape[1]] = batch.tables
    step = PagedStep(wide, batch.starts, batch.context, 1, 48)
    kernel = FlashAttention3()
    given = kernel(batch.query[:3], batch.keys, batch.values, step, window=None, scale=8**-0.5)
    torch.testing.assert_close(given, batch.truth())
    assert package.calls[0]["page_table"].shape == (3, 3)
    assert package.calls[0]["q"].shape == (3, 1, 4, 8)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"head_dim": 256, "windows": (None, 4096)}, None),
        ({"is_shared": True}, None),
        ({"capability": (8, 0)}, "not for chips of compute capability 8.0"),
        ({"capability": (10, 0)}, "compute capability 10.0"),
        ({"page_dtype": torch.float8_e4m3fn}, "these hold float8_e4m3fn"),
        ({"dtype": torch.float32, "page_dtype": torch.float32}, "these hold float32"),
        ({"dtype": torch.float16}, "in the dtype of the pages"),
        ({"head_dim": 300}, "not for heads of 300"),
        ({"head_dim": 100}, "not for heads of 100"),
    ],
)
def test_what_it_is_not_for(changes: dict, said: str | None, package) -> None:
    reason = FlashAttention3().refused(HEADS.__class__(**{**vars(HEADS), **changes}))
    assert reason is None if said is None else said in str(reason)


def test_is_looked_for_and_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(PathFinder, "find_spec", lambda name, *_: asked.append(name))
    assert not is_installed()
    assert asked == [flash_attention_3.MODULE]


def test_its_version(package) -> None:
    kernel = FlashAttention3()
    assert kernel.version == "3.0.0" and kernel.records and kernel.name == "flash-attn-3"
