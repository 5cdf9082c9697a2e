"""The program that compiles an engine's kernels does so for a chip that is not there, and a real launch finds them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tunesmith.engine.compiling_worker import device_of


def test_the_device_is_the_engines() -> None:
    assert device_of({"asked": {"device": "cuda:1"}}) == "cuda:1"


def test_without_a_gpu_it_imports_nothing_and_compiles_nothing(tmp_path: Path) -> None:
    request = json.dumps({"asked": {"model": "builtin:tiny", "device": "auto"}, "marker": str(tmp_path / "marker")})
    command = [sys.executable, "-m", "tunesmith.engine.compiling_worker"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, input=request, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"kernels": 0}


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("quantize", [None, "fp8", "int4", "int8", "nf4"])
def test_all_of_them_compile_for_hopper(quantize: str | None, torch_forks: Callable[..., str], tmp_path: Path) -> None:
    """In a process of its own, as the worker is, in which two compile; each kernel once."""
    pytest.importorskip("triton")
    code = (
        "import json\n"
        "from tunesmith.engine.compiling_worker import find\n"
        "from tunesmith.kernels.compiling_worker import work\n"
        f"asked = {{'model': 'recipes/configs/qwen2.5-7b', 'quantize': {quantize!r}, 'weights': 'random'}}\n"
        "print(json.dumps(work(find, {'asked': asked}, (9, 0, 132), 2)))"
    )
    answer = json.loads(torch_forks(code, TRITON_CACHE_DIR=str(tmp_path)))
    assert answer["failed"] == []
    assert answer["kernels"] >= 30
    assert len(list(tmp_path.rglob("*.cubin"))) == answer["kernels"]
