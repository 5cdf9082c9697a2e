"""The paged key/value cache: storage made once, pages lent to requests, shared and counted.

Per layer, keys and values are [P, S, K, H]: P pages of S slots. A request's table names its pages in order:

    position   0 .. S-1   S .. 2S-1   2S .. 3S-1
    page       table[0]   table[1]    table[2]       slot = page * S + position % S

A page is in one of three states:

    in use   has users, one or several (a prefix that requests share)
    known    nobody uses it, but the prefix cache can still find what it holds; the longest unused goes first
    blank    nobody uses it and nothing is known of it; taken before any known page
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from tunesmith.arch import ModelConfig
from tunesmith.kernels.chip import is_gpu
from tunesmith.units import ceil_div

PAGE_SLOTS = 16
ARRIVALS = 2**16
"""Requests x key heads of a step for which attention counts the parts of a context that are done."""


class PageAllocator:
    """Which pages are free, and how many users each of the others has. Pure bookkeeping, every call O(1) but `check`.

    `on_forgotten(page)` is called when a known page is taken for something else.
    """

    def __init__(self, num_pages: int) -> None:
        self.counts = [0] * num_pages
        # A dict pops what was put in last: a page that was just given back is warm, and page 0 goes first at the start.
        self._blank = dict.fromkeys(range(num_pages - 1, -1, -1))
        self._known: OrderedDict[int, None] = OrderedDict()
        self._remembered: set[int] = set()
        self.on_forgotten: Callable[[int], None] = lambda page: None

    @property
    def num_pages(self) -> int:
        """Pages there are."""
        return len(self.counts)

    @property
    def num_free(self) -> int:
        """Pages without a user."""
        return len(self._blank) + len(self._known)

    @property
    def num_used(self) -> int:
        """Pages with at least one user."""
        return self.num_pages - self.num_free

    @property
    def num_known(self) -> int:
        """Pages without a user whose content can still be found."""
        return len(self._known)

    def take(self, after: int | None = None) -> int:
        """A free page, now with one user: the one behind `after` where that is blank (keys that lie side by side)."""
        if after is not None and after + 1 in self._blank:
            page = after + 1
            del self._blank[page]
        elif self._blank:
            page = self._blank.popitem()[0]
        elif self._known:
            page = self._known.popitem(last=False)[0]
            self._remembered.discard(page)
            self.on_forgotten(page)
        else:
            raise MemoryError("no free page: the scheduler planned more than the cache holds")
        self.counts[page] = 1
        return page

    def take_run(self, num: int, after: int | None = None) -> list[int]:
        """So many pages as `take` gives them one after the other, each behind the one before where that is blank."""
        found: list[int] = []
        blank, counts = self._blank, self.counts
        for _ in range(num):
            if after is not None and after + 1 in blank:
                after += 1
                del blank[after]
                counts[after] = 1
            else:
                after = self.take()
            found.append(after)
        return found

    def share(self, page: int) -> None:
        """One more user for a page whose content is there: in use, or known."""
        if not self.counts[page]:
            if page not in self._known:
                raise ValueError(f"page {page} is free and can't be shared")
            del self._known[page]
        self.counts[page] += 1

    def release(self, page: int) -> None:
        """One user fewer; the page is free when none is left."""
        if not self.counts[page]:
            raise ValueError(f"page {page} was released twice")
        self.counts[page] -= 1
        if self.counts[page]:
            return
        if page in self._remembered:
            self._known[page] = None
        else:
            self._blank[page] = None

    def release_all(self, pages: Sequence[int]) -> None:
        """Release a request's pages, the last first: a prefix is worth more than what followed it."""
        counts = self.counts
        for page in reversed(pages):
            if counts[page] == 1:
                counts[page] = 0
                (self._known if page in self._remembered else self._blank)[page] = None
            else:
                self.release(page)

    def remember(self, pages: Sequence[int]) -> None:
        """The content of these pages in use can be found from now on, also when nobody uses them any more."""
        for page in pages:
            if not self.counts[page]:
                raise ValueError(f"page {page} is free and can't be remembered")
        self._remembered.update(pages)

    def forget(self, pages: Iterable[int]) -> None:
        """The content of these pages can't be found any more."""
        for page in pages:
            self._remembered.discard(page)
            if page in self._known:
                del self._known[page]
                self._blank[page] = None

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise ValueError unless these tables account for every user of every page, and the rest is free once."""
        expected = [0] * self.num_pages
        for table in tables:
            for page in table:
                expected[page] += 1
        wrong = [page for page in range(self.num_pages) if expected[page] != self.counts[page]]
        free = set(self._blank) | set(self._known)
        wrong += [page for page in free if expected[page]]
        if wrong or self.num_free != expected.count(0) or len(free) != self.num_free:
            raise ValueError(f"page accounting is broken: pages {wrong[:8]}, {self.num_free} counted as free")


class PagedCache:
    """Keys and values of all layers for `num_pages` pages, allocated once.

    keys, values: per layer [P, S, K, H]. With dtype float8_e4m3fn, key_scales and value_scales are per layer float32
    [P, K]; otherwise None. arrivals: counters of attention over these pages (kernels/paged_attention.py).
    """

    def __init__(self, config: ModelConfig, num_pages: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.config = config
        self.dtype = dtype
        self.device = device
        self.num_pages = num_pages
        shape = (num_pages, PAGE_SLOTS, config.num_key_value_heads, config.head_dim)
        layers = range(config.num_hidden_layers)
        # On a CPU memory that is never written is never taken from the machine, so nothing is zeroed here.
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        counts = is_gpu(device)
        self.arrivals = torch.zeros(ARRIVALS, dtype=torch.int32, device=device) if counts else None
        self.key_scales: list[Tensor] | None = None
        self.value_scales: list[Tensor] | None = None
        if dtype == torch.float8_e4m3fn:
            self.key_scales = [_scales(shape, device) for _ in layers]
            self.value_scales = [_scales(shape, device) for _ in layers]

    @property
    def token_bytes(self) -> int:
        """Bytes that one token takes over all layers."""
        return token_bytes(self.config, self.dtype)

    @property
    def capacity_bytes(self) -> int:
        """Bytes of all pages."""
        return self.token_bytes * PAGE_SLOTS * self.num_pages


def _scales(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.ones(shape[0], shape[2], dtype=torch.float32, device=device)


def token_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values over all layers, without the scales of fp8 (4 / S a head)."""
    return 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize * config.num_hidden_layers


def page_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of one page over all layers, with its scales."""
    scales = 8 * config.num_key_value_heads * config.num_hidden_layers if dtype == torch.float8_e4m3fn else 0
    return token_bytes(config, dtype) * PAGE_SLOTS + scales


def pages_of(num_tokens: int) -> int:
    """Pages that hold this many tokens of one request."""
    return ceil_div(num_tokens, PAGE_SLOTS)
