"""The paged key/value cache: fixed pages, lent to requests and counted.

Per layer, keys and values are [P, S, K, H]: P pages of S slots. A request's table names its pages in order:

    position   0 .. S-1   S .. 2S-1   2S .. 3S-1
    page       table[0]   table[1]    table[2]       slot = page * S + position % S

A request reserves its worst case in numbers only, and takes pages as it grows, so admitted requests always
finish. Where a free stretch is long enough for all of a request it is the request's home: its pages are taken there
side by side, and its keys are one view, not a gather. Another request takes a page of it only when it finds no better.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tunesmith.arch import ModelConfig
from tunesmith.units import ceil_div

PAGE_SLOTS = 16


class PageAllocator:
    """Which pages are free, and how many users each of the others has. Pure bookkeeping."""

    def __init__(self, num_pages: int = 0) -> None:
        self.counts = [0] * num_pages
        self.num_free = num_pages

    @property
    def num_pages(self) -> int:
        """Pages there are."""
        return len(self.counts)

    @property
    def num_used(self) -> int:
        """Pages with at least one user."""
        return self.num_pages - self.num_free

    def grow(self, num_pages: int) -> None:
        """Add pages, all free, until there are `num_pages`."""
        added = num_pages - self.num_pages
        self.counts.extend([0] * added)
        self.num_free += added

    def take(self, after: int | None = None) -> int:
        """A free page, now with one user: the one behind `after` if free, else the start of the longest free run."""
        if not self.num_free:
            raise MemoryError("no free page: the scheduler admitted more than the cache holds")
        if after is not None and after + 1 < self.num_pages and not self.counts[after + 1]:
            page = after + 1
        else:
            page = self._longest_run()
        self.counts[page] = 1
        self.num_free -= 1
        return page

    def _longest_run(self) -> int:
        best, best_length, start = -1, 0, 0
        for page in range(self.num_pages + 1):
            if page < self.num_pages and not self.counts[page]:
                continue
            if page - start > best_length:
                best, best_length = start, page - start
            start = page + 1
        return best

    def share(self, page: int) -> None:
        """One more user for a page in use."""
        if not self.counts[page]:
            raise ValueError(f"page {page} is free and can't be shared")
        self.counts[page] += 1

    def release(self, page: int) -> None:
        """One user fewer; the page is free when none is left."""
        if not self.counts[page]:
            raise ValueError(f"page {page} was released twice")
        self.counts[page] -= 1
        self.num_free += not self.counts[page]

    def check(self, tables: Sequence[Sequence[int]]) -> None:
        """Raise ValueError unless these tables account for every user of every page."""
        expected = [0] * self.num_pages
        for table in tables:
            for page in table:
                expected[page] += 1
        wrong = [page for page in range(self.num_pages) if expected[page] != self.counts[page]]
        if wrong or self.num_free != expected.count(0):
            raise ValueError(f"page accounting is broken: pages {wrong[:8]}, {self.num_free} counted as free")


class PageTable:
    """The pages of one request, in the order of its positions. `length` tokens are in the cache."""

    def __init__(self, cache: PagedCache, max_tokens: int) -> None:
        self.cache = cache
        self.max_pages = ceil_div(max_tokens, PAGE_SLOTS)
        self.home: int | None = None
        self.pages: list[int] = []
        self.length = 0
        self.contiguous = True

    def extend(self, num_tokens: int) -> None:
        """Take the pages that `num_tokens` more tokens need."""
        needed = ceil_div(self.length + num_tokens, PAGE_SLOTS)
        while len(self.pages) < needed:
            last = self.pages[-1] if self.pages else None
            page = self.cache.allocator.take(self.home - 1 if last is None and self.home is not None else last)
            self.contiguous = self.contiguous and (last is None or page == last + 1)
            self.pages.append(page)
        self.length += num_tokens

    def slots(self, start: int, stop: int) -> list[int]:
        """Where positions start .. stop-1 live, as flat slot indices."""
        return [self.pages[i // PAGE_SLOTS] * PAGE_SLOTS + i % PAGE_SLOTS for i in range(start, stop)]

    def close(self) -> None:
        """Give all pages and the reservation back. Closing twice does nothing."""
        self.cache.close(self)


class PagedCache:
    """Keys and values of all layers, and who holds which page. Storage grows (doubling) up to `max_tokens`."""

    def __init__(self, config: ModelConfig, max_tokens: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.config = config
        self.dtype = dtype
        self.device = device
        self.max_pages = ceil_div(max_tokens, PAGE_SLOTS)
        self.allocator = PageAllocator()
        self.tables: list[PageTable] = []
        self.keys = [self._storage(0) for _ in range(config.num_hidden_layers)]
        self.values = [self._storage(0) for _ in range(config.num_hidden_layers)]
        self.flat = self._flat_views()

    def _flat_views(self) -> list[tuple[Tensor, Tensor]]:
        """Per layer the same keys and values as [P * S, K, H], indexed by slot."""
        return [(key.flatten(0, 1), value.flatten(0, 1)) for key, value in zip(self.keys, self.values, strict=True)]

    def _storage(self, num_pages: int) -> Tensor:
        shape = (num_pages, PAGE_SLOTS, self.config.num_key_value_heads, self.config.head_dim)
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def open(self, max_tokens: int) -> PageTable | None:
        """A table for a request of at most `max_tokens` tokens, or None while there is no room for its worst case."""
        table = PageTable(self, max_tokens)
        promised = table.max_pages + sum(other.max_pages for other in self.tables)
        if promised > self.max_pages:
            return None
        if promised > self.allocator.num_pages:
            self._grow(min(self.max_pages, max(promised, 2 * self.allocator.num_pages)))
        table.home = self._find_home(table.max_pages)
        self.tables.append(table)
        return table

    def _find_home(self, num_pages: int) -> int | None:
        """The start of the first stretch of free pages, outside all other homes, that is long enough."""
        busy = [bool(count) for count in self.allocator.counts]
        for table in self.tables:
            if table.home is not None:
                busy[table.home : table.home + table.max_pages] = [True] * table.max_pages
        length = 0
        for page, is_busy in enumerate(busy):
            length = 0 if is_busy else length + 1
            if length == num_pages:
                return page + 1 - num_pages
        return None

    def close(self, table: PageTable) -> None:
        """Take a table's pages back."""
        if table not in self.tables:
            return
        self.tables.remove(table)
        for page in table.pages:
            self.allocator.release(page)
        table.pages = []

    def _grow(self, num_pages: int) -> None:
        for storages in (self.keys, self.values):
            for layer, old in enumerate(storages):
                storages[layer] = self._storage(num_pages)
                storages[layer][: len(old)] = old
        self.flat = self._flat_views()
        self.allocator.grow(num_pages)

    def check(self) -> None:
        """Raise ValueError unless every page's users are exactly the open tables that name it."""
        self.allocator.check([table.pages for table in self.tables])

    @property
    def token_bytes(self) -> int:
        """Bytes that one token takes over all layers."""
        config = self.config
        size = config.num_key_value_heads * config.head_dim * self.dtype.itemsize
        return 2 * size * config.num_hidden_layers

    @property
    def used_bytes(self) -> int:
        """Bytes of the tokens that are in the cache."""
        return self.token_bytes * sum(table.length for table in self.tables)

    @property
    def reserved_bytes(self) -> int:
        """Bytes of the pages that hold them: what `used_bytes` is compared with."""
        return self.token_bytes * PAGE_SLOTS * self.allocator.num_used

    @property
    def capacity_bytes(self) -> int:
        """Bytes of storage that exist now."""
        return self.token_bytes * PAGE_SLOTS * self.allocator.num_pages
