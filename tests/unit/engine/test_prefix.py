"""The prefix cache: equal beginnings are found, everything else is not."""

from __future__ import annotations

import pytest

from tunesmith.engine import prefix as prefix_module
from tunesmith.engine.pages import PAGE_SLOTS, PageAllocator
from tunesmith.engine.prefix import PageChain, PrefixCache

S = PAGE_SLOTS


def store(cache: PrefixCache, ids: list[int], chain: PageChain | None = None) -> list[int]:
    """Full pages of these tokens, remembered and given back."""
    chain = chain or PageChain()
    pages = [cache.allocator.take() for _ in range(len(ids) // S)]
    cache.remember(chain, ids, 0, pages)
    cache.allocator.release_all(pages)
    return pages


def tokens(start: int, num: int) -> list[int]:
    return list(range(start, start + num))


def test_the_longest_known_beginning_is_found_but_never_all() -> None:
    cache = PrefixCache(PageAllocator(8))
    ids = tokens(0, 3 * S)
    pages = store(cache, ids)
    assert cache.lookup(PageChain(), [*ids, 1]) == pages
    assert cache.lookup(PageChain(), ids) == pages[:2], "the last token is always computed"
    assert cache.lookup(PageChain(), ids[: 2 * S + 5]) == pages[:2]
    assert cache.lookup(PageChain(), [*ids[: S - 1], 99, *ids[S:], 1]) == []
    assert cache.lookup(PageChain(), [*ids[:S], *tokens(500, S), *ids[2 * S :], 1]) == pages[:1]
    assert cache.lookup(PageChain(), ids[:S]) == []


def test_a_page_stands_for_what_came_before_it_too() -> None:
    cache = PrefixCache(PageAllocator(8))
    store(cache, tokens(0, 2 * S))
    assert cache.lookup(PageChain(), [*tokens(S, S), 1]) == [], "the second page's tokens, but at the start"


@pytest.mark.parametrize(("salt", "adapter"), [("mine", None), ("", "german"), ("", "")])
def test_salt_and_adapter_keep_apart(salt: str, adapter: str | None) -> None:
    cache = PrefixCache(PageAllocator(8))
    ids = tokens(0, 2 * S + 1)
    store(cache, ids)
    assert cache.lookup(PageChain(salt, adapter), ids) == []
    own = store(cache, ids, PageChain(salt, adapter))
    assert cache.lookup(PageChain(salt, adapter), ids) == own


def test_equal_hashes_of_different_tokens_are_no_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    def collide(running: object, pages: list[bytes]) -> list[bytes]:
        return [b"same"] * len(pages)

    monkeypatch.setattr(prefix_module, "page_keys", collide)
    cache = PrefixCache(PageAllocator(8))
    store(cache, tokens(0, S))
    assert cache.lookup(PageChain(), tokens(0, S + 1)) != []
    assert cache.lookup(PageChain(), tokens(7, S + 1)) == []
    store(cache, tokens(7, S))
    assert len(cache) == 1, "what is there stays"


def test_pages_that_are_taken_are_forgotten_the_tail_first() -> None:
    cache = PrefixCache(PageAllocator(3))
    ids = tokens(0, 3 * S + 1)
    pages = store(cache, ids)
    taken = cache.allocator.take()
    assert taken == pages[2]
    assert cache.lookup(PageChain(), ids) == pages[:2]
    cache.clear()
    assert cache.lookup(PageChain(), ids) == [] and len(cache) == 0
    assert cache.allocator.num_known == 0


def test_the_first_page_of_equal_content_stays() -> None:
    cache = PrefixCache(PageAllocator(4))
    ids = tokens(0, S + 1)
    first, second = store(cache, ids), store(cache, ids)
    assert first != second
    assert cache.lookup(PageChain(), ids) == first
    cache.allocator.check([])


def test_keys_do_not_depend_on_how_many_pages_were_asked_for_at_once() -> None:
    ids = tokens(0, 5 * S + 3)
    together, apart = PageChain("salt"), PageChain("salt")
    together.extend(ids, 5)
    for number in (1, 0, 3, 2, 5):
        apart.extend(ids, number)
        assert len(apart.keys) >= number
    assert apart.keys == together.keys and apart.pages == together.pages
    assert len(set(apart.keys)) == 5


def test_what_is_remembered_in_parts_is_found_as_a_whole() -> None:
    """Pieces of a prompt, and a page whose content is known already among them."""
    cache = PrefixCache(PageAllocator(8))
    ids, chain = tokens(0, 4 * S + 1), PageChain()
    first = store(cache, ids[:S])
    pages = cache.allocator.take_run(4)
    cache.remember(chain, ids, 0, pages[:2])
    cache.remember(chain, ids, 2, pages[2:])
    assert cache.lookup(PageChain(), ids) == [*first, *pages[1:]]
    assert len(cache) == 4
