"""Packs: every document exactly once an epoch, exactly T tokens, targets that never cross a boundary."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.errors import DataError
from tunesmith.text.packing import UNTRAINED, build_pack, fill_rate, plan_epoch

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=200)


class Documents:
    """Documents whose tokens say which document and place they are from; odd places are trained."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def arrays(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        places = np.arange(self.lengths[index], dtype=np.int32)
        return 1000 * (index + 1) + places, (places % 2 == 1) & (places > 0)


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.booleans(), st.integers(0, 3), st.integers(0, 3), st.booleans())
def test_every_document_once_and_packs_exact(
    lengths: list[int], packing: bool, seed: int, epoch: int, shuffle: bool
) -> None:
    plan = plan_epoch(lengths, 100, seed=seed, epoch=epoch, packing=packing, max_length=40, shuffle=shuffle)
    assert sorted(i for pack in plan for i in pack) == list(range(len(lengths)))
    documents = Documents(lengths)
    for indices in plan:
        pack = build_pack(documents, indices, 100, packing=packing, max_length=40, filler_id=7)
        assert pack.tokens.shape == pack.targets.shape == (100,)
        assert sum(pack.lengths) == 100
        assert pack.documents == indices
        check_targets(documents, pack.tokens.numpy(), pack.targets.numpy(), pack.lengths)
        assert pack.num_real_tokens == sum(lengths[i] for i in indices)
        assert pack.num_trained == sum(lengths[i] // 2 for i in indices)


def check_targets(documents: Documents, tokens: np.ndarray, targets: np.ndarray, lengths: tuple[int, ...]) -> None:
    start = 0
    for length in lengths:
        ids, goals = tokens[start : start + length], targets[start : start + length]
        start += length
        if ids[0] == 7:
            assert (ids == 7).all()
            assert (goals == UNTRAINED).all()
            continue
        index = int(ids[0]) // 1000 - 1
        whole, trained = documents.arrays(index)
        assert (ids == whole).all()
        assert goals[-1] == UNTRAINED
        for i in range(length - 1):
            assert goals[i] == (whole[i + 1] if trained[i + 1] else UNTRAINED)


def test_plan_is_a_function_of_seed_and_epoch() -> None:
    lengths = list(range(1, 40)) * 5

    def plan(seed: int, epoch: int) -> list[tuple[int, ...]]:
        return plan_epoch(lengths, 64, seed=seed, epoch=epoch, packing=True, max_length=40)

    assert plan(0, 0) == plan(0, 0)
    assert plan(0, 0) != plan(0, 1)
    assert plan(0, 0) != plan(1, 0)


def test_padded_documents_have_their_own_slots() -> None:
    plan = plan_epoch([3, 4, 1], 10, seed=0, epoch=0, packing=False, max_length=4, shuffle=False)
    assert plan == [(0, 1), (2,)]
    pack = build_pack(Documents([3, 4, 1]), plan[0], 10, packing=False, max_length=4)
    assert pack.lengths == (3, 1, 4, 2)


def test_packs_are_full() -> None:
    """Best fit in a window of open packs fills to 99 % what next-fit fills to about 80 %."""
    lengths = np.random.default_rng(0).integers(10, 500, 5000)
    plan = plan_epoch(lengths, 1024, seed=0, epoch=0, packing=True, max_length=512)
    assert fill_rate(lengths, plan, 1024) > 0.98


@pytest.mark.parametrize("lengths", [[11], [0, 3]])
def test_document_that_fits_nowhere(lengths: list[int]) -> None:
    with pytest.raises(DataError, match=r"data\.max_length"):
        plan_epoch(lengths, 10, seed=0, epoch=0, packing=True, max_length=10)
