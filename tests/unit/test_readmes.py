"""The Chinese README says what the English one says: commands, tables, links and figures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENGLISH, CHINESE = "README.md", "README.zh-CN.md"


def commands(text: str) -> list[str]:
    """The lines of console blocks, without comments; what stands in <> differs by language."""
    blocks = re.findall(r"```console\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.partition(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [re.sub(r"<[^>]*>", "<>", line) for line in lines]


def links(text: str) -> list[str]:
    targets = {target for target in re.findall(r"\]\(([^)]*)\)", text) if target not in (ENGLISH, CHINESE)}
    return sorted("#" if target.startswith("#") else target for target in targets)


def figures(text: str) -> list[list[str]]:
    """The numbers of every table row, in order."""
    rows = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [sorted(re.findall(r"\d[\d,.]*\d|\d", row)) for row in rows]


@pytest.mark.parametrize("part", [commands, links, figures])
def test_both_languages_say_the_same(part) -> None:
    """The Chinese one had lost a third of its content."""
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in (ENGLISH, CHINESE))
    assert part(chinese) == part(english)


@pytest.mark.parametrize("name", [ENGLISH, CHINESE])
def test_links_into_the_page_meet_a_heading(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
    inside = re.findall(r"\]\(#([^)]*)\)", text)
    assert inside and set(inside) <= anchors
