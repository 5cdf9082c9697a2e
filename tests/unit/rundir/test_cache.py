"""Where things are kept between commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.rundir.cache import user_cache


@pytest.mark.parametrize(("said", "root"), [("/caches", Path("/caches")), ("", Path.home() / ".cache")])
def test_it_lies_where_the_user_keeps_caches(said: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", said)
    assert user_cache("attention") == root / "tunesmith" / "attention"
