"""The tree of errors, and the hint for a misspelt name."""

from __future__ import annotations

import inspect
import re

import pytest

from tunesmith import errors
from tunesmith.errors import MissingExtraError, TunesmithError, nearest

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, TunesmithError)]


@pytest.mark.parametrize("error", CLASSES)
def test_the_drawn_tree_names_every_error_with_its_builtin(error: type[TunesmithError]) -> None:
    drawing = errors.__doc__ or ""
    line = next(line for line in drawing.splitlines() if re.search(rf"\b{error.__name__}\b", line))
    for builtin in re.findall(r"\((\w+Error)\)", line):
        assert issubclass(error, getattr(__import__("builtins"), builtin))


def test_a_missing_extra_names_the_line_that_installs_it() -> None:
    assert str(MissingExtraError("wandb", "wandb")).endswith("pip install 'tunesmith[wandb]'")


def test_nearest_names_a_near_name_and_is_silent_about_a_far_one() -> None:
    assert nearest("learning_rat", ["learning_rate", "seed"]) == ", did you mean 'learning_rate'?"
    assert nearest("zzz", ["learning_rate"]) == ""
