"""Page accounting: nothing is lost, nothing is lent twice, whatever order requests come and go in."""

from __future__ import annotations

import random

import pytest
import torch

from tunesmith.arch import ModelConfig
from tunesmith.engine.pages import PAGE_SLOTS, PageAllocator, PagedCache

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


def make_cache(max_tokens: int = 20 * PAGE_SLOTS) -> PagedCache:
    return PagedCache(CONFIG, max_tokens, dtype=torch.float32, device=torch.device("cpu"))


def test_pages_are_taken_side_by_side() -> None:
    allocator = PageAllocator(8)
    first = allocator.take()
    assert [first, allocator.take(first), allocator.take(first + 1)] == [0, 1, 2]


def test_a_new_run_starts_in_the_longest_free_stretch() -> None:
    allocator = PageAllocator(8)
    pages = [allocator.take(p - 1 if p else None) for p in range(8)]
    assert pages == list(range(8))
    for page in (1, 4, 5, 6):
        allocator.release(page)
    assert allocator.take() == 4
    assert allocator.take(after=2) == 5, "page 3 is in use, so the longest run is next"


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


def test_check_finds_a_page_nobody_names() -> None:
    allocator = PageAllocator(2)
    allocator.take()
    with pytest.raises(ValueError, match="accounting is broken"):
        allocator.check([])


def test_a_request_reserves_its_worst_case() -> None:
    cache = make_cache(4 * PAGE_SLOTS)
    table = cache.open(3 * PAGE_SLOTS)
    assert table is not None
    assert cache.open(2 * PAGE_SLOTS) is None, "two more pages were promised than there are"
    other = cache.open(PAGE_SLOTS)
    assert other is not None
    table.extend(3 * PAGE_SLOTS)
    other.extend(1)
    cache.check()
    table.close()
    table.close()
    assert cache.allocator.num_used == 1
    assert cache.open(3 * PAGE_SLOTS) is not None


def test_requests_that_grow_in_turn_stay_contiguous() -> None:
    cache = make_cache()
    tables = [cache.open(5 * PAGE_SLOTS) for _ in range(3)]
    for _ in range(5):
        for table in tables:
            assert table is not None
            table.extend(PAGE_SLOTS)
    assert [table.pages for table in tables if table] == [list(range(s, s + 5)) for s in (0, 5, 10)]
    assert all(table.contiguous for table in tables if table)


def test_bytes_are_counted_by_token_and_by_page() -> None:
    cache = make_cache()
    token_bytes = 2 * 2 * 1 * 4 * 4  # keys and values, layers, heads, head_dim, float32
    table = cache.open(100)
    assert table is not None
    assert cache.used_bytes == cache.reserved_bytes == 0
    table.extend(PAGE_SLOTS + 1)
    assert cache.used_bytes == (PAGE_SLOTS + 1) * token_bytes
    assert cache.reserved_bytes == 2 * PAGE_SLOTS * token_bytes
    stored = sum(t.nbytes for t in (*cache.keys, *cache.values))
    assert cache.capacity_bytes == stored


def test_growing_keeps_what_is_stored() -> None:
    cache = make_cache()
    table = cache.open(PAGE_SLOTS)
    assert table is not None
    table.extend(PAGE_SLOTS)
    cache.flat[1][0][:PAGE_SLOTS] = 7.0
    before = cache.capacity_bytes
    assert cache.open(5 * PAGE_SLOTS) is not None
    assert cache.capacity_bytes > before
    assert (cache.flat[1][0][:PAGE_SLOTS] == 7.0).all()
    assert cache.flat[1][0].data_ptr() == cache.keys[1].data_ptr()


@pytest.mark.parametrize("seed", range(5))
def test_random_traffic_leaves_nothing_behind(seed: int) -> None:
    choice = random.Random(seed)
    cache = make_cache()
    open_tables = []
    for _ in range(300):
        table = cache.open(choice.randint(1, 100)) if choice.random() < 0.4 else None
        if table is not None:
            open_tables.append(table)
        elif open_tables and choice.random() < 0.4:
            open_tables.pop(choice.randrange(len(open_tables))).close()
        for table in open_tables:
            if table.length < (table.max_pages - 1) * PAGE_SLOTS:
                table.extend(choice.randint(1, PAGE_SLOTS))
        cache.check()
        pages = [page for table in open_tables for page in table.pages]
        assert len(pages) == len(set(pages))
        for table in open_tables:
            runs = all(b == a + 1 for a, b in zip(table.pages, table.pages[1:], strict=False))
            assert table.contiguous == runs
    for table in open_tables:
        table.close()
    cache.check()
    assert cache.allocator.num_used == 0
