"""The ids that peers get are the session's, whatever their lengths; files give back what was written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.bench.peers.batches import (
    Documents,
    digest,
    documents_of,
    load_windows,
    peer_inputs,
    save_windows,
)
from tunesmith.bench.peers.job import Job
from tunesmith.recipe.schema import Recipe
from tunesmith.train.losses import IGNORED
from tunesmith.train.session import build_session

UNEVEN = Documents(torch.arange(1, 6), torch.tensor([IGNORED, 2, 3, IGNORED, 5]), (3, 2))
EVEN = Documents(torch.arange(6), torch.tensor([IGNORED, 1, 2, IGNORED, 4, 5]), (3, 3))


def test_equal_lengths_are_a_plain_batch() -> None:
    inputs = peer_inputs(EVEN, packed=True)
    assert inputs["input_ids"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert set(inputs) == {"input_ids", "labels"}


def test_packed_documents_start_anew() -> None:
    inputs = peer_inputs(UNEVEN, packed=True)
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert inputs["labels"].tolist() == [[IGNORED, 2, 3, IGNORED, 5]]


def test_padded_rows_are_masked() -> None:
    inputs = peer_inputs(UNEVEN, packed=False)
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert inputs["input_ids"].tolist() == [[1, 2, 3], [4, 5, 0]]
    assert inputs["labels"].tolist() == [[IGNORED, 2, 3], [IGNORED, 5, IGNORED]]


def test_files_keep_every_step(tmp_path: Path) -> None:
    def own(documents: Documents) -> Documents:
        return Documents(documents.tokens_T.clone(), documents.labels_T.clone(), documents.lengths)

    windows = [[own(EVEN), own(UNEVEN)], [own(UNEVEN)], *([own(EVEN)] for _ in range(10))]
    save_windows(windows, tmp_path / "b.safetensors")
    read = load_windows(tmp_path / "b.safetensors")
    assert [digest(window) for window in read] == [digest(window) for window in windows]
    assert [d.lengths for d in read[0]] == [(3, 3), (3, 2)]
    assert [len(window) for window in read] == [2, *[1] * 11]


def test_a_digest_sees_ids_labels_and_lengths() -> None:
    others = [
        Documents(EVEN.tokens_T + 1, EVEN.labels_T, EVEN.lengths),
        Documents(EVEN.tokens_T, EVEN.labels_T.clone().fill_(IGNORED), EVEN.lengths),
        Documents(EVEN.tokens_T, EVEN.labels_T, (2, 4)),
    ]
    assert len({digest([d]) for d in (EVEN, *others)}) == 4


@pytest.mark.parametrize("packing", [True, False])
def test_prepared_windows_are_the_session_s(
    packing: bool,
    peer_recipe: Callable[..., Recipe],
    prepared: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(f'{{"text": "{"xyz" * (1 + i % 4)}"}}' for i in range(30)), encoding="utf-8")
    data = {"format": "auto", "train": [str(rows)], "packing": packing, "cache": False, "workers": 0}
    job = Job.of(prepared(peer_recipe(data=data, train={"accumulation": 2}))["job"])
    session = build_session(job.recipe)
    windows = load_windows(job.batches)
    for step, window in enumerate(windows):
        host = session.host_window(step)
        mine = [documents_of(batch, job.recipe.data) for batch in host.batches]
        assert digest(mine) == digest(window)
        assert sum(d.num_trained for d in window) == host.num_trained
        assert sum(d.num_tokens for d in window) == sum(batch.num_tokens for batch in host.batches)
    session.close()
    assert len(windows) == 3 and len(windows[0]) == 2
