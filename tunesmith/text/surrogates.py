"""What in a text is no Unicode: lone surrogates, which Python reads bytes as that are not UTF-8."""

from __future__ import annotations

from collections.abc import Iterable


def no_character(texts: Iterable[str]) -> str | None:
    """Where the first lone surrogate of these texts stands, in words; None where there is none."""
    for text in texts:
        found = next((place for place, letter in enumerate(text) if "\ud800" <= letter <= "\udfff"), None)
        if found is not None:
            code = ord(text[found])
            what = f"the byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"U+{code:04X}"
            return f"{what} behind {found} characters is no character of UTF-8"
    return None
