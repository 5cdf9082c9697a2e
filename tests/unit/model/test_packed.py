"""Packed tokens: positions, boundaries, refusals."""

from __future__ import annotations

import pytest
import torch

from tunesmith.model.packed import pack_documents, packed


def test_positions_restart_in_every_document() -> None:
    pack = pack_documents([[5, 6, 7], [8], [9, 10]])
    assert pack.tokens_T.tolist() == [5, 6, 7, 8, 9, 10]
    assert pack.positions_T.tolist() == [0, 1, 2, 0, 0, 1]
    assert pack.boundaries.tolist() == [0, 3, 4, 6]
    assert pack.boundaries.dtype == torch.int32
    assert pack.max_length == 3
    assert pack.length_of_each_token().tolist() == [3, 3, 3, 1, 2, 2]


@pytest.mark.parametrize("documents", [[], [[]], [[1], []]])
def test_empty_documents_are_refused(documents: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        pack_documents(documents)


def test_lengths_must_sum_to_the_tokens() -> None:
    with pytest.raises(ValueError, match="lengths sum to 3, got 4"):
        packed(torch.zeros(4, dtype=torch.int64), [1, 2])
