"""Micro-batches: what is counted, what is refused, how random tokens are made."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tunesmith.errors import DataError
from tunesmith.recipe.schema import DataSection
from tunesmith.train.batches import MicroBatch, RandomTokens, build_micro_batch, cut, describe_rows, joined


@pytest.mark.parametrize("packing", [True, False])
def test_fillers_are_counted_nowhere(packing: bool) -> None:
    documents = RandomTokens(3, 20, 50, seed=1)
    batch = build_micro_batch(documents, [2, 0], 100, DataSection(max_length=32, packing=packing), 50)
    assert batch.pack.tokens_T.shape == (100,)
    assert sum(batch.pack.lengths) == 100
    assert max(batch.pack.lengths) <= 32
    assert (batch.num_tokens, batch.num_trained, batch.lengths) == (40, 38, (20, 20))
    # The target of a trained position is the token after it, in the same document.
    assert torch.equal(batch.pack.tokens_T[batch.index + 1], batch.targets)
    assert batch.to(torch.device("cpu")) is batch


@pytest.mark.parametrize(("packing", "tokens"), [(True, 40), (False, 96)])
def test_without_tail_keeps_what_is_trained(packing: bool, tokens: int) -> None:
    documents = RandomTokens(3, 20, 50, seed=1)
    batch = build_micro_batch(documents, [2, 0], 96, DataSection(max_length=32, packing=packing), 50)
    short = batch.without_tail()
    assert short.pack.tokens_T.numel() == sum(short.pack.lengths) == tokens
    assert torch.equal(short.pack.tokens_T[short.index + 1], short.targets)
    assert (short.num_tokens, short.num_trained, short.lengths) == (40, 38, (20, 20))


def test_a_token_outside_the_vocabulary_names_its_row() -> None:
    documents = RandomTokens(3, 20, 50, seed=1)
    largest = int(max(documents.arrays(1)[0]))
    with pytest.raises(DataError, match=rf"random:\d: token \d+ is outside the model's vocabulary of {largest}"):
        build_micro_batch(documents, [1], 64, DataSection(max_length=32), largest)


def test_random_tokens_are_a_function_of_seed_and_index() -> None:
    one, same, other = (RandomTokens(4, 16, 1000, seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(one[2].tokens, same[2].tokens)
    assert not np.array_equal(one[2].tokens, other[2].tokens)
    held_out = RandomTokens(2, 16, 1000, seed=3, first=4)
    assert not any(np.array_equal(held_out[i].tokens, one[j].tokens) for i in range(2) for j in range(4))
    assert not one[0].trained[0]
    assert one[0].trained[1:].all()


def test_rows_of_a_large_batch_are_named_briefly() -> None:
    documents = RandomTokens(30, 4, 10, seed=0)
    assert describe_rows(documents, range(2)) == "random:1, random:2"
    assert describe_rows(documents, range(30)).endswith("random:8 and 22 more")


def _tensors(batch: MicroBatch) -> list[torch.Tensor]:
    return [batch.pack.tokens_T, batch.pack.positions_T, batch.pack.boundaries, batch.index, batch.targets]


@pytest.mark.parametrize("rows", [[2, 0], [1], [0, 1, 2]])
def test_one_copy_takes_a_micro_batch_to_its_device(rows: list[int]) -> None:
    documents = RandomTokens(3, 19, 50, seed=1)
    batch = build_micro_batch(documents, rows, 101, DataSection(max_length=32), 50)
    block = joined(_tensors(batch))
    for found, expected in zip(cut(block, _tensors(batch)), _tensors(batch), strict=True):
        assert found.dtype == expected.dtype and torch.equal(found, expected)
        assert found.data_ptr() % 16 == 0
        assert found.untyped_storage().data_ptr() == block.untyped_storage().data_ptr()
    there = replace(batch, block=block).to(torch.device("meta"))
    assert there.block is None and there.pack.lengths == batch.pack.lengths
    assert [(t.shape, t.dtype) for t in _tensors(there)] == [(t.shape, t.dtype) for t in _tensors(batch)]
    assert len({tensor.untyped_storage()._cdata for tensor in _tensors(there)}) == 1
    assert all(tensor.is_meta for tensor in _tensors(batch.to(torch.device("meta"))))


def test_a_batch_without_targets_is_copied_too() -> None:
    tensors = [torch.arange(3), torch.zeros(0, dtype=torch.int64), torch.tensor([7, 8], dtype=torch.int32)]
    assert [part.tolist() for part in cut(joined(tensors), tensors)] == [[0, 1, 2], [], [7, 8]]
