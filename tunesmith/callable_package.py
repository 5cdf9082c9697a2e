"""Packages that are also the function they are named after: `tunesmith.train(recipe)` beside `tunesmith.train.loop`.

A package imported from anywhere becomes an attribute of its parent and would hide a function of the same name,
so the package itself answers the call.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


def make_callable(package: str, module: str, function: str) -> None:
    """Let calling `package` call `function` of `module`, imported at the first call."""

    class CallablePackage(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return getattr(importlib.import_module(module), function)(*args, **kwargs)

    sys.modules[package].__class__ = CallablePackage
