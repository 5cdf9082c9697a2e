"""Each token's own text and bytes, as log-probabilities show them."""

from __future__ import annotations

from functools import lru_cache

from tunesmith.text.tokenizer import Tokenizer


class TokenTexts:
    """Texts of single tokens. A token that is a part of a character has bytes, and U+FFFD in its text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._bytes_of = _byte_alphabet() if _is_byte_level(tokenizer) else None
        self.token_bytes = lru_cache(maxsize=2**17)(self._token_bytes)

    def _token_bytes(self, token: int) -> bytes:
        """The bytes that the token adds to a text."""
        raw = self.tokenizer.token_text(token)
        if self.tokenizer.is_special(token):
            return raw.encode("utf-8", errors="replace")
        if self._bytes_of is not None and all(character in self._bytes_of for character in raw):
            return bytes(self._bytes_of[character] for character in raw)
        if len(raw) == 6 and raw.startswith("<0x") and raw.endswith(">"):
            return bytes([int(raw[3:5], 16)])
        return raw.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode("utf-8", errors="replace")

    def text(self, token: int) -> str:
        """The token's text."""
        return self.token_bytes(token).decode("utf-8", errors="replace")


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether the vocabulary writes bytes as GPT-2's printable characters (a space is written so)."""
    ids = tokenizer.encode(" a")
    return any("\u0120" in tokenizer.token_text(token) for token in ids)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 characters stand for themselves, the other bytes for U+0100 and on.

    Source: Radford et al. 2019, `bytes_to_unicode` of the released encoder.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(256 + at): byte for at, byte in enumerate(others)}
