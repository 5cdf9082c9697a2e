"""The prefix cache: which page holds the keys and values of which beginning.

A full page is found by a hash of its own tokens and of all before them, so that it stands for both:

    key_0 = hash(root, tokens 0 .. S-1)     key_1 = hash(root, tokens 0 .. 2S-1)     root = hash(salt, adapter)

One running hash gives all of a request's keys: a page more is two calls of C. Keys and values depend on nothing else,
so requests with equal beginnings share the pages. A hash is never trusted alone: a page is taken only when the tokens
written beside it, and the key before it, are the same.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from tunesmith.engine.pages import PAGE_SLOTS, PageAllocator

_TOKEN = "q"
_PAGE_BYTES = PAGE_SLOTS * array(_TOKEN).itemsize


def root_key(salt: str, adapter: str | None) -> bytes:
    """What the chains of one salt and one adapter begin with."""
    name = b"" if adapter is None else b"adapter:" + adapter.encode()
    return blake2b(salt.encode() + b"\0" + name, digest_size=16).digest()


def page_keys(running: blake2b, pages: Sequence[bytes]) -> list[bytes]:
    """The keys of full pages behind all that the running hash has seen. It has seen these too then."""
    update, digest = running.update, running.digest
    keys = []
    for tokens in pages:
        update(tokens)
        keys.append(digest())
    return keys


_Entry = tuple[int, bytes, bytes]
"""A page, the key of the page before it, and its tokens. A plain tuple of such: the collector leaves it alone."""


class PrefixCache:
    """Keys to pages. A page that is taken for something else is forgotten here (`PageAllocator.on_forgotten`)."""

    def __init__(self, allocator: PageAllocator) -> None:
        self.allocator = allocator
        self._entries: dict[bytes, _Entry] = {}
        self._keys: dict[int, bytes] = {}
        allocator.on_forgotten = self._drop

    def __len__(self) -> int:
        return len(self._entries)

    def lookup(self, chain: PageChain, token_ids: Sequence[int]) -> list[int]:
        """The pages of the longest known beginning of these tokens. Never all of them: one token is always computed.

        The pages aren't the caller's until they are shared.
        """
        num_pages = (len(token_ids) - 1) // PAGE_SLOTS
        chain.extend(token_ids, num_pages)
        found: list[int] = []
        parent = chain.root
        for key, tokens in zip(chain.keys[:num_pages], chain.pages, strict=False):
            entry = self._entries.get(key)
            if entry is None or entry[2] != tokens or entry[1] != parent:
                break
            found.append(entry[0])
            parent = key
        return found

    def remember(self, chain: PageChain, token_ids: Sequence[int], first: int, pages: Sequence[int]) -> None:
        """A request's full pages from this index on will be found from now on.

        Another page of the same content stays, and is the one that is found.
        """
        last = first + len(pages)
        chain.extend(token_ids, last)
        entries, known = self._entries, self._keys
        parent = chain.keys[first - 1] if first else chain.root
        new: list[int] = []
        for key, tokens, page in zip(chain.keys[first:last], chain.pages[first:last], pages, strict=True):
            if key not in entries and page not in known:
                entries[key] = page, parent, tokens
                known[page] = key
                new.append(page)
            parent = key
        self.allocator.remember(new)

    def clear(self) -> None:
        """Forget everything: the weights changed, or a step failed whose pages were remembered already."""
        self.allocator.forget(list(self._keys))
        self._entries.clear()
        self._keys.clear()

    def _drop(self, page: int) -> None:
        key = self._keys.pop(page, None)
        if key is not None:
            del self._entries[key]


class PageChain:
    """The keys of one sequence's full pages and their tokens in bytes, made as they are needed and kept.

    prompt_T: int64, the first of its tokens, where somebody has them as numbers already.
    """

    def __init__(self, salt: str = "", adapter: str | None = None, prompt_T: np.ndarray | None = None) -> None:
        self._prompt_T = prompt_T
        self.root = root_key(salt, adapter)
        self.keys: list[bytes] = []
        self.pages: list[bytes] = []
        self._running = blake2b(self.root, digest_size=16)

    def extend(self, token_ids: Sequence[int], num_pages: int) -> None:
        """Have at least so many pages, the first ones of these tokens."""
        start = len(self.keys)
        if num_pages <= start:
            return
        here = slice(start * PAGE_SLOTS, num_pages * PAGE_SLOTS)
        if self._prompt_T is not None and here.stop <= len(self._prompt_T):
            held = self._prompt_T[here].tobytes()
        else:
            held = array(_TOKEN, token_ids[here]).tobytes()
        pages = [held[at : at + _PAGE_BYTES] for at in range(0, len(held), _PAGE_BYTES)]
        self.pages += pages
        self.keys += page_keys(self._running, pages)
