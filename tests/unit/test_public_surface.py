"""The stable Python interface: what `tunesmith` exports is what docs/api.md describes, and all of it is there."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tunesmith

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "api.md"


def test_documentation_names_exactly_the_exports() -> None:
    headings = re.findall(r"^## `tunesmith\.(\w+)", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(headings) == sorted(set(tunesmith.__all__))


@pytest.mark.parametrize("name", tunesmith.__all__)
def test_every_export_is_there_and_documented(name: str) -> None:
    value = getattr(tunesmith, name)
    assert isinstance(value, str) or inspect.getdoc(value)


def test_dir_lists_the_exports() -> None:
    assert set(tunesmith.__all__) <= set(dir(tunesmith))


def test_an_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = tunesmith.no_such_thing


def test_importing_the_package_imports_nothing_heavy() -> None:
    program = (
        "import sys, tunesmith, tunesmith.cli.main;"
        "print([m for m in ('torch', 'transformers', 'pydantic', 'numpy', 'rich', 'typer') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
