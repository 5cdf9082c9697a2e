"""Whoever sets torch's own variable decides about huge pages."""

from __future__ import annotations

import os

import pytest

from tunesmith.checkpoint.huge_pages import VARIABLE, use_huge_pages


def test_they_are_asked_for_unless_somebody_said_no(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "0")
    use_huge_pages()
    assert os.environ[VARIABLE] == "0"
    monkeypatch.delenv(VARIABLE)
    use_huge_pages()
    assert os.environ[VARIABLE] == "1"
    monkeypatch.delenv(VARIABLE)
