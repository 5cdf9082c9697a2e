"""The threads of compiled steps: how many there are, and what they share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.kernels import cpu_library

DRAW = """
import resource, threading
import torch
from tunesmith.kernels import cpu_library
from tunesmith.kernels.sampling_native import NativeDraw

none, zeros = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
native = NativeDraw(cpu_library.load(), temperatures_N=none, top_p_N=none + 1, min_p_N=none, seeds_N=zeros,
                    top_k_N=zeros, last_tokens_N=zeros.clone())

def is_right(rows, vocab_size, threads):
    slots = torch.zeros(rows, dtype=torch.int64)
    logits = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(0))
    wanted = logits.argmax(1)
    torch.set_num_threads(threads)
    found = native(logits, slots, slots)
    torch.set_num_threads(1)
    return torch.equal(found, wanted)
"""


@pytest.fixture
def drawing(compiled_library: Any, kernel_cache: Path, torch_forks: Callable[..., str]) -> Callable[[str], str]:
    """What code prints behind DRAW, in a process of its own."""
    assert compiled_library is not None
    environment = {"XDG_CACHE_HOME": str(kernel_cache), cpu_library.SWITCH: "1"}
    return lambda code: torch_forks(DRAW + code, **environment).strip()


def test_where_the_system_gives_no_more_threads_there_are_fewer(drawing: Callable[[str], str]) -> None:
    """An exception of the first call left C++ and ended the process."""
    code = """
assert is_right(4, 20_000, 2)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, used + 2**26))  # some stacks more
print(is_right(4, 20_000, 64), is_right(4, 20_000, 64))
"""
    assert drawing(code) == "True True"


def test_a_draw_without_memory_is_an_error(drawing: Callable[[str], str]) -> None:
    """An exception of whichever thread it was ended the process."""
    code = """
assert is_right(4, 20_000, 2)
vocab_size = 20_000_000
logits, slots = torch.zeros(2, vocab_size), torch.zeros(2, dtype=torch.int64)
native = NativeDraw(cpu_library.load(), temperatures_N=none + 1, top_p_N=none + 0.5, min_p_N=none, seeds_N=zeros,
                    top_k_N=zeros, last_tokens_N=zeros.clone())
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, used + 2**26))
torch.set_num_threads(2)
try:
    native(logits, slots, slots)
except MemoryError as error:
    print(error)
print(native(logits[:, :20_000], slots, slots).shape)
"""
    assert drawing(code) == "no memory to draw from 2 rows of 20000000 logits\ntorch.Size([2])"


def test_a_phase_has_any_number_of_parts(drawing: Callable[[str], str]) -> None:
    """Of 2^20 parts and more the number ran into its neighbour in the ticket, and the caller waited for ever."""
    code = """
found = []
caller = threading.Thread(target=lambda: found.append(is_right(2**20 + 1, 2, 2)), daemon=True)
caller.start()
caller.join(60)
print(found)
"""
    assert drawing(code) == "[True]"


def test_as_many_threads_as_cores_have_one_each(drawing: Callable[[str], str]) -> None:
    """Two of them shared a core for ten seconds beside an idle one: both looked busy, so the system left them there."""
    code = """
import os, pathlib, time
def core_of(cpu):
    return pathlib.Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
mine = os.sched_getaffinity(0)
cores = len({core_of(cpu) for cpu in mine})
wanted = cores - 1 if cores > 1 and os.environ.get("TUNESMITH_CPU_BIND") != "0" else 0
assert is_right(4, 20_000, max(2, cores))
def bound_now():
    places = [os.sched_getaffinity(int(task)) for task in os.listdir("/proc/self/task")]
    return [cpus for cpus in places if cpus != mine]
end = time.monotonic() + 30
while len(bound := bound_now()) < wanted and time.monotonic() < end:  # a thread may not have begun yet
    time.sleep(0.01)
print(len(bound) == wanted, all(len({*map(core_of, cpus)}) == 1 for cpus in bound), os.sched_getaffinity(0) == mine)
"""
    if not hasattr(os, "sched_getaffinity") or not Path("/sys/devices/system/cpu/cpu0/topology").exists():
        pytest.skip("threads are bound on Linux")
    for said in ("1", "0"):
        assert drawing(f"import os\nos.environ['TUNESMITH_CPU_BIND'] = '{said}'\n" + code) == "True True True"


def test_other_numbers_of_threads_are_left_where_they_are(drawing: Callable[[str], str]) -> None:
    code = """
import os
mine = os.sched_getaffinity(0)
assert is_right(4, 20_000, 3 * len(mine))
print(all(os.sched_getaffinity(int(task)) == mine for task in os.listdir("/proc/self/task")))
"""
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("threads are bound on Linux")
    assert drawing(code) == "True"
