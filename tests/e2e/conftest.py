"""What people start runs as they start it: with our own C++ on the CPU (other tests leave it off)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


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
