"""Page accounting: nothing is lost, nothing is lent twice, whatever order requests come and go in."""

from __future__ import annotations

import random

import pytest
import torch

from tunesmith.arch import ModelConfig
from tunesmith.engine.pages import PAGE_SLOTS, PageAllocator, PagedCache, page_bytes, pages_of

CONFIG = ModelConfig(
    family="llama",
    vocab_size=8,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    max_position_embeddings=256,
    norm_eps=1e-6,
)


def test_pages_are_taken_side_by_side() -> None:
    allocator = PageAllocator(8)
    first = allocator.take()
    assert [first, allocator.take(first), allocator.take(first + 1)] == [0, 1, 2]


def test_a_page_that_was_given_back_goes_first_but_the_next_one_is_preferred() -> None:
    allocator = PageAllocator(8)
    pages = [allocator.take() for _ in range(4)]
    allocator.release(pages[1])
    assert allocator.take(after=3) == 4, "side by side"
    assert allocator.take(after=4 - 1) == 1, "page 4 is in use, so the page that is warm"


def test_a_run_of_pages_is_what_taking_one_after_the_other_gives() -> None:
    runs, singles = PageAllocator(12), PageAllocator(12)
    for allocator in (runs, singles):
        held = [allocator.take() for _ in range(9)]
        allocator.remember([held[7]])
        for page in (held[2], held[3], held[5], held[7]):
            allocator.release(page)
    found = runs.take_run(6, after=1)
    last: int | None = 1
    for page in found:
        last = singles.take(last)
        assert last == page
    assert found[:2] == [2, 3], "blank pages that lie side by side"
    assert runs.counts == singles.counts and runs.num_free == singles.num_free == 1
    assert runs.take_run(0) == []


def test_shared_pages_live_until_their_last_user_goes() -> None:
    allocator = PageAllocator(2)
    page = allocator.take()
    allocator.share(page)
    allocator.release(page)
    assert allocator.num_used == 1
    allocator.check([[page]])
    allocator.release(page)
    assert allocator.num_used == 0
    with pytest.raises(ValueError, match="released twice"):
        allocator.release(page)
    with pytest.raises(ValueError, match="can't be shared"):
        allocator.share(page)
    with pytest.raises(ValueError, match="can't be remembered"):
        allocator.remember([page])


def test_known_pages_come_back_and_the_longest_unused_goes_first() -> None:
    allocator, forgotten = PageAllocator(4), []
    allocator.on_forgotten = forgotten.append
    pages = [allocator.take() for _ in range(4)]
    for page in pages[:3]:
        allocator.remember([page])
    allocator.release_all(pages)
    assert (allocator.num_free, allocator.num_known) == (4, 3)
    allocator.share(0)  # found again
    allocator.release(0)
    assert [allocator.take() for _ in range(4)] == [3, 2, 1, 0], "blank first, then from the tail of what was kept"
    assert forgotten == [2, 1, 0]
    with pytest.raises(MemoryError):
        allocator.take()
    allocator.check([[0, 1, 2, 3]])


def test_forgetting_makes_known_pages_blank() -> None:
    allocator = PageAllocator(2)
    page = allocator.take()
    allocator.remember([page])
    allocator.release(page)
    allocator.forget([page])
    assert (allocator.num_free, allocator.num_known) == (2, 0)
    allocator.check([])


def test_check_finds_a_page_nobody_names() -> None:
    allocator = PageAllocator(2)
    allocator.take()
    with pytest.raises(ValueError, match="accounting is broken"):
        allocator.check([])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn], ids=str)
def test_the_storage_is_what_the_arithmetic_says(dtype: torch.dtype) -> None:
    cache = PagedCache(CONFIG, 5, dtype=dtype, device=torch.device("cpu"))
    stored = sum(t.nbytes for t in (*cache.keys, *cache.values, *(cache.key_scales or ()), *(cache.value_scales or ())))
    assert stored == 5 * page_bytes(CONFIG, dtype)
    assert cache.capacity_bytes == sum(t.nbytes for t in (*cache.keys, *cache.values))
    assert cache.token_bytes == 2 * 2 * 1 * 4 * dtype.itemsize  # keys and values, layers, heads, head_dim
    assert cache.keys[0].shape == (5, PAGE_SLOTS, 1, 4)


def test_pages_of_tokens() -> None:
    assert [pages_of(n) for n in (0, 1, PAGE_SLOTS, PAGE_SLOTS + 1)] == [0, 1, 1, 2]


@pytest.mark.parametrize("seed", range(5))
def test_random_traffic_leaves_nothing_behind(seed: int) -> None:
    choice = random.Random(seed)
    allocator = PageAllocator(20)
    known: set[int] = set()
    allocator.on_forgotten = known.remove
    tables: list[list[int]] = []
    for _ in range(600):
        kind = choice.random()
        if kind < 0.5 and allocator.num_free:
            if not tables or choice.random() < 0.3:
                tables.append([])
            table = choice.choice(tables)
            table.append(allocator.take(table[-1] if table else None))
        elif kind < 0.6 and tables:
            shared = [*choice.choice(tables)[:2]]
            for page in shared:
                allocator.share(page)
            tables.append(shared)
        elif kind < 0.65 and known:
            page = choice.choice(sorted(known))
            allocator.share(page)
            tables.append([page])
        elif kind < 0.8 and tables:
            for page in choice.choice(tables)[:1]:
                allocator.remember([page])
                known.add(page)
        elif tables:
            allocator.release_all(tables.pop(choice.randrange(len(tables))))
        allocator.check(tables)
    for table in tables:
        allocator.release_all(table)
    allocator.check([])
    assert allocator.num_used == 0
