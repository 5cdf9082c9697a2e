"""torch's own threads have a core each before torch computes beside our own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.kernels import cpu_library
from tunesmith.kernels.cpu_compile import BuildError
from tunesmith.kernels.torch_threads import address_in_libgomp

BIND = """
import os, pathlib
import torch
from tunesmith.kernels import cpu_library, torch_threads

def core_of(cpu):
    return pathlib.Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()

mine = os.sched_getaffinity(0)
cores = len({core_of(cpu) for cpu in mine})
library = cpu_library.load()

def bound():
    \"\"\"The cores of every thread that has not all of them.\"\"\"
    places = [os.sched_getaffinity(int(task)) for task in os.listdir("/proc/self/task")]
    return sorted(next(iter({*map(core_of, cpus)})) for cpus in places if cpus != mine)

torch.set_num_threads(threads)
for _ in range(3):
    torch_threads.bind(library)
    assert torch.equal(torch.ones(1_000_000).add(1), torch.full((1_000_000,), 2.0))
"""


@pytest.fixture
def binding(compiled_library: Any, kernel_cache: Path, torch_forks: Callable[..., str]) -> Callable[..., str]:
    """What code prints behind BIND with so many threads, in a process of its own."""
    assert compiled_library is not None
    if not hasattr(os, "sched_getaffinity") or not Path("/sys/devices/system/cpu/cpu0/topology").exists():
        pytest.skip("threads are bound on Linux")
    try:
        address_in_libgomp("GOMP_parallel")
    except BuildError as error:
        pytest.skip(str(error))
    environment = {"XDG_CACHE_HOME": str(kernel_cache), cpu_library.SWITCH: "1"}

    def run(threads: str, code: str, bind: str = "1") -> str:
        before = f"import os\nos.environ['TUNESMITH_CPU_BIND'] = '{bind}'\nthreads = {threads}\n"
        return torch_forks(before + BIND + code, **environment).strip()

    return run


def test_as_many_threads_as_cores_have_one_each(binding: Callable[..., str]) -> None:
    """Two of torch's shared a core beside an idle one, and waited for each other at every operation."""
    cores = len(os.sched_getaffinity(0))
    code = """
import time
end = time.monotonic() + 30
while len(bound()) < 2 * (cores - 1) and time.monotonic() < end:  # one of ours may not have begun yet
    time.sleep(0.01)
found = bound()
print(len(found) == 2 * (cores - 1), all(found.count(core) == 2 for core in found), os.sched_getaffinity(0) == mine)
"""
    if cores < 2:
        pytest.skip("one core has nothing to bind")
    threads = "len({open(f'/sys/devices/system/cpu/cpu{c}/topology/thread_siblings_list').read() "
    threads += "for c in os.sched_getaffinity(0)})"
    assert binding(threads, code) == "True True True"


@pytest.mark.parametrize(("threads", "bind"), [("3 * len(os.sched_getaffinity(0))", "1"), ("2", "0"), ("1", "1")])
def test_they_are_left_where_ours_are(threads: str, bind: str, binding: Callable[..., str]) -> None:
    assert binding(threads, "print(bound())", bind) == "[]"
