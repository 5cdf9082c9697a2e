"""The prefix cache: which page holds the keys and values of which beginning.

A full page is found by a chain of hashes, so that it stands for its own tokens and for all before them:

    key_0 = hash(root, tokens 0 .. S-1)     key_1 = hash(key_0, tokens S .. 2S-1)     root = hash(salt, adapter)

Keys and values depend on nothing else, so requests with equal beginnings share the pages. A hash is never trusted
alone: a page is taken only when the tokens written beside it, and the key before it, are the same.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from tunesmith.engine.pages import PAGE_SLOTS, PageAllocator


def root_key(salt: str, adapter: str | None) -> bytes:
    """What the chains of one salt and one adapter begin with."""
    name = b"" if adapter is None else b"adapter:" + adapter.encode()
    return blake2b(salt.encode() + b"\0" + name, digest_size=16).digest()


def page_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The key of a full page behind `parent`."""
    return blake2b(array("q", token_ids).tobytes(), key=parent, digest_size=16).digest()


@dataclass(frozen=True)
class _Entry:
    page: int
    parent: bytes
    token_ids: tuple[int, ...]


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
        found: list[int] = []
        for index in range((len(token_ids) - 1) // PAGE_SLOTS):
            ids = tuple(token_ids[index * PAGE_SLOTS : (index + 1) * PAGE_SLOTS])
            entry = self._entries.get(chain.key(index, token_ids))
            if entry is None or entry.token_ids != ids or entry.parent != chain.key(index - 1, token_ids):
                break
            found.append(entry.page)
        return found

    def remember(self, chain: PageChain, token_ids: Sequence[int], index: int, page: int) -> None:
        """A request's full page of this index will be found from now on. Another page of the same content stays."""
        key = chain.key(index, token_ids)
        if key in self._entries or page in self._keys:
            return
        ids = tuple(token_ids[index * PAGE_SLOTS : (index + 1) * PAGE_SLOTS])
        self._entries[key] = _Entry(page, chain.key(index - 1, token_ids), ids)
        self._keys[page] = key
        self.allocator.remember(page)

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
    """The keys of one sequence's full pages, made as they are needed and kept."""

    def __init__(self, salt: str = "", adapter: str | None = None) -> None:
        self.root = root_key(salt, adapter)
        self._keys: list[bytes] = []

    def key(self, index: int, token_ids: Sequence[int]) -> bytes:
        """The key of page `index`; of page -1, the root."""
        while len(self._keys) <= index:
            start = len(self._keys) * PAGE_SLOTS
            parent = self._keys[-1] if self._keys else self.root
            self._keys.append(page_key(parent, token_ids[start : start + PAGE_SLOTS]))
        return self._keys[index] if index >= 0 else self.root
