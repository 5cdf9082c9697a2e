"""What people start runs as they start it: with our own C++ on the CPU (other tests leave it off)."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

LOWEST_PORT, HIGHEST_PORT = 10_000, 19_999
"""Below what systems give to connections that go out (Linux from 32768), and to jobs of SLURM (20000)."""


@pytest.fixture(scope="session")
def free_ports() -> Callable[[int], list[int]]:
    """So many ports that nobody has, each another one, for servers that must be told theirs before they start.

    They are drawn, and not asked of the system: it gives a port that was let go to the next connection that asks.
    """

    def draw(count: int) -> list[int]:
        found: list[int] = []
        with contextlib.ExitStack() as held:
            while len(found) < count:
                port, taken = random.SystemRandom().randint(LOWEST_PORT, HIGHEST_PORT), socket.socket()
                held.callback(taken.close)
                with contextlib.suppress(OSError):
                    taken.bind(("", port))
                    found.append(port)
        return found

    return draw


@pytest.fixture(scope="module", autouse=True)
def _own_operations(kernel_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    from tunesmith.kernels import cpu_library, cpu_train

    cache = tmp_path_factory.mktemp("cache")
    libraries = kernel_cache / "tunesmith" / "kernels"
    libraries.mkdir(parents=True, exist_ok=True)
    (cache / "tunesmith").mkdir()
    (cache / "tunesmith" / "kernels").symlink_to(libraries, target_is_directory=True)

    def forget() -> None:
        cpu_train.forget()
        cpu_library.load.cache_clear()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        patch.delenv(cpu_train.SWITCH, raising=False)
        patch.delenv(cpu_library.SWITCH, raising=False)
        forget()
        yield
    forget()
