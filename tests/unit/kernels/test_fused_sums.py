"""Every launch says whether a product and a sum are rounded once: Triton's own answer changes from 3.10 on."""

from __future__ import annotations

import ast
from pathlib import Path

import tunesmith

ROOT = Path(tunesmith.__file__).parent


def _silent(path: Path) -> list[str]:
    """Launches, kernel[grid](..., NAME=constant), that leave it to Triton."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
            names = {keyword.arg or "**" for keyword in node.keywords}
            if any(name.isupper() for name in names) and not {"enable_fp_fusion", "**"} & names:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    return found


def test_every_launch_says_it() -> None:
    """Those that did not warned at the start of every program with Triton 3.9."""
    assert [line for path in sorted(ROOT.rglob("*.py")) for line in _silent(path)] == []
