"""Lone surrogates are named by the byte that they were."""

from __future__ import annotations

from tunesmith.text.surrogates import no_character


def test_the_first_one_is_named() -> None:
    assert no_character(["plain", "几点"]) is None
    assert no_character(["plain", b"ab\xff\xfe".decode("utf-8", "surrogateescape")]) == (
        "the byte 0xff behind 2 characters is no character of UTF-8"
    )
    assert no_character(["\ud800"]) == "U+D800 behind 0 characters is no character of UTF-8"
