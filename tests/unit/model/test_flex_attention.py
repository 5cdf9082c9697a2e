"""FlexAttention over packed documents: the blocks of its mask, and the same attention as document by document."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tunesmith.model import attention_choice, flex_attention
from tunesmith.model.attention import attend_one
from tunesmith.model.attention_choice import AttentionShape, offer
from tunesmith.model.flex_attention import BLOCK, attend_flex, block_mask, seen_blocks
from tunesmith.model.packed import packed

# Without a GPU nothing is compiled, which torch says once: the scores are held whole.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
PACKS = [(1,), (128,), (300, 5, 128, 200), (7,) * 60, (129, 127, 1), (640,)]


def _seen(lengths: tuple[int, ...], window: int | None) -> Tensor:
    """bool [T, T], by definition."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(sum(lengths))
    seen = (document[:, None] == document[None, :]) & (place[None, :] <= place[:, None])
    return seen if window is None else seen & (place[None, :] > place[:, None] - window)


@pytest.mark.parametrize("lengths", PACKS)
@pytest.mark.parametrize("window", [None, 1, 64, 200])
def test_every_block_is_what_its_pairs_say(lengths: tuple[int, ...], window: int | None) -> None:
    seen = _seen(lengths, window)
    partial, whole = seen_blocks(lengths, window)
    assert not (partial & whole).any()
    for i in range(len(partial)):
        for j in range(len(partial)):
            block = seen[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
            if whole[i, j]:
                assert bool(block.all())
            elif not partial[i, j]:
                assert not bool(block.any())


@pytest.mark.parametrize("lengths", [(300, 5, 128, 200), (129, 127, 1), (40, 7)])
@pytest.mark.parametrize(("window", "num_kv_heads"), [(None, 4), (None, 2), (64, 2)])
def test_the_same_attention(lengths: tuple[int, ...], window: int | None, num_kv_heads: int) -> None:
    torch.manual_seed(0)
    num_tokens = sum(lengths)
    heads = (4, num_kv_heads, num_kv_heads)
    tensors = [torch.randn(num_tokens, count, 16) for count in heads]
    pack = packed(torch.zeros(num_tokens, dtype=torch.int64), lengths)
    found = attend_flex(*tensors, pack, window)
    parts = zip(*(tensor.split(lengths) for tensor in tensors), strict=True)
    wanted = torch.cat([attend_one(query, key, value, window) for query, key, value in parts])
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


def test_the_mask_of_a_pack_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, ...]] = []

    def counted(lengths: tuple[int, ...], window: int | None, device: torch.device) -> object:
        made.append(lengths)
        return block_mask(lengths, window, device)

    monkeypatch.setattr(flex_attention, "block_mask", counted)
    packs = [packed(torch.zeros(12, dtype=torch.int64), lengths) for lengths in ((5, 7), (12,))]
    tensors = [torch.randn(12, 2, 16) for _ in range(3)]
    for pack in (packs[0], packs[0], packs[1], packs[0]):
        attend_flex(*tensors, pack, None)
    assert made == [(5, 7), (12,)]


def test_it_is_measured_only_where_it_is_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_choice, "_offered", set())
    uneven = AttentionShape("gpu", "bfloat16", 4, 2, 8, 64, 32, is_even=False, has_window=True)
    assert uneven.candidates == ("varlen",)
    offer("flex", True)
    assert uneven.candidates == ("varlen", "flex")
    even = AttentionShape("gpu", "bfloat16", 4, 2, 8, 64, 32, is_even=True, has_window=False)
    assert "flex" not in even.candidates
    offer("flex", False)
    assert uneven.candidates == ("varlen",)
