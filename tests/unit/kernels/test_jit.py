"""Kernels' keys are the same whatever was launched, or imported, before."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
KERNELS = Path(__file__).parents[3] / "tunesmith" / "kernels"
_KEYS = """
import importlib, json, sys
from triton.runtime.jit import JITFunction
keys = {}
for name in json.loads(sys.argv[1]):
    module = importlib.import_module("tunesmith.kernels." + name)
    found = [(key, value) for key, value in vars(module).items() if isinstance(value, JITFunction)]
    for key, value in found if sys.argv[2] == "forwards" else found[::-1]:
        if value.fn.__module__.startswith("tunesmith."):
            keys[value.fn.__module__ + "." + key] = value.cache_key
print(json.dumps(keys))
"""


def test_a_key_depends_on_no_order() -> None:
    """A worker that compiles ahead and a process that launches come to them in orders of their own."""
    names = sorted(path.stem for path in KERNELS.glob("*_triton.py"))
    assert len(names) > 30
    found = []
    for order in ("forwards", "backwards"):
        given = json.dumps(names if order == "forwards" else names[::-1])
        done = subprocess.run([sys.executable, "-c", _KEYS, given, order], capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout))
    assert len(found[0]) > 100
    assert found[0] == found[1]


def test_every_kernel_has_its_key_at_once() -> None:
    for path in KERNELS.glob("*_triton.py"):
        assert "@triton.jit" not in path.read_text(encoding="utf-8"), path.name


def test_it_takes_the_options_of_tritons() -> None:
    import triton.language as tl

    from tunesmith.kernels.jit import jit

    @jit(do_not_specialize=["num"])
    def kernel(values, num, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        tl.store(values + tl.arange(0, BLOCK), num)

    assert callable(kernel.run)
    names = [parameter.name for parameter in getattr(kernel, "params", ()) if parameter.do_not_specialize]
    assert names in (["num"], [])  # the interpreter has no parameters
