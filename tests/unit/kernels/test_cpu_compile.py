"""Kernels are compiled once for a machine, whatever happens to their cache and whoever wants them at the same time."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from tunesmith.kernels import cpu_compile, cpu_library
from tunesmith.kernels.cpu_compile import BuildError, cache_folder, compiled

pytestmark = pytest.mark.skipif(cpu_compile.find_compiler() is None, reason="no C++ compiler here")
SOURCE = '#include "seven.hpp"\nextern "C" int seven() { return SEVEN; }\n'


class Workshop:
    """A source, a cache folder of its own, and a compiler that counts."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.source, self.log = folder / "seven.cpp", folder / "compiled"
        self.source.write_text(SOURCE)
        self.header = folder / "seven.hpp"
        self.header.write_text("#define SEVEN 7\n")
        compiler = folder / "compiler"
        real = cpu_compile.find_compiler()
        compiler.write_text(f'#!/bin/sh\ncase "$*" in *-o*) echo . >> {self.log};; esac\nexec {real} "$@"\n')
        compiler.chmod(0o755)
        self.compiler = compiler
        patch.setenv("CXX", str(compiler))
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setattr(cpu_compile, "_FLAGS", ("-shared", "-fPIC"))

    def seven(self) -> int:
        value: int = compiled(self.source).seven()
        return value

    @property
    def times(self) -> int:
        """How often something was compiled."""
        return len(self.log.read_text().split()) if self.log.exists() else 0

    def kept(self) -> list[Path]:
        return sorted(cache_folder().glob("*.so"))


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    return Workshop(tmp_path, monkeypatch)


def test_it_is_compiled_once_for_sources_compiler_and_processor(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert workshop.seven() == workshop.seven() == 7
    assert workshop.times == 1
    workshop.header.write_text("#define SEVEN 8\n")
    assert (workshop.seven(), workshop.times) == (8, 2)
    monkeypatch.setattr(cpu_compile, "_processor", lambda: b"another machine that shares this home directory")
    assert (workshop.seven(), workshop.times) == (8, 3)
    assert len(workshop.kept()) == 3


def test_others_may_read_what_is_kept(workshop: Workshop) -> None:
    """In a container's image, say, that was made by another user: only its owner could load it."""
    before = os.umask(0o022)
    try:
        assert workshop.seven() == 7
    finally:
        os.umask(before)
    (kept,) = workshop.kept()
    assert kept.stat().st_mode & 0o777 == 0o755


def test_those_who_want_it_at_once_wait_for_one_compiler(workshop: Workshop) -> None:
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(workshop.seven())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (found, workshop.times) == ([7] * 4, 1)


def test_a_damaged_file_is_compiled_again(workshop: Workshop) -> None:
    assert workshop.seven() == 7
    (kept,) = workshop.kept()
    other = Path(shutil.copy(workshop.source, workshop.source.with_name("eight.cpp")))
    damaged = kept.with_name(kept.name.replace("seven", "eight"))  # the key is of the contents
    damaged.write_bytes(b"half of a libr")
    assert (compiled(other).seven(), workshop.times) == (7, 2)
    assert damaged.stat().st_size > 1000
    assert {path.suffix for path in cache_folder().iterdir()} == {".so", ".lock"}


def test_what_a_killed_compiler_has_left_goes_away(workshop: Workshop) -> None:
    """An unfinished file stayed for ever where its process was killed; one that is still written is let be."""
    cache_folder().mkdir(parents=True)
    left, written = cache_folder() / "tmp0left.so", cache_folder() / "tmp1written.so"
    for file in (left, written):
        file.touch()
    os.utime(left, (time.time() - 4000,) * 2)
    assert workshop.seven() == 7
    assert not left.exists()
    assert written.exists()


@pytest.mark.parametrize("lack", ["a file where the folder should be", "no space"])
def test_where_nothing_can_be_kept_it_is_for_this_process_alone(
    lack: str, workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    if lack == "no space":
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(2**30, 2**30, 2**20))
    else:
        (tmp_path / "cache").write_text("")
    assert workshop.seven() == 7
    assert "for this process alone" in caplog.text
    assert not workshop.kept() and not list(scratch.iterdir())


def test_what_can_not_be_compiled_is_one_line(workshop: Workshop, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    workshop.header.write_text("")
    with pytest.raises(BuildError, match=r"ended with code 1.*SEVEN"):
        workshop.seven()
    assert not workshop.kept() and not list(cache_folder().glob("tmp*"))
    workshop.compiler.unlink()
    monkeypatch.setenv("PATH", os.devnull)
    monkeypatch.delenv(cpu_library.SWITCH)
    caplog.clear()
    assert cpu_library.load.__wrapped__() is None
    assert len(caplog.records) == 1 and "no C++ compiler" in caplog.text
    caplog.clear()
    monkeypatch.setenv(cpu_library.SWITCH, "0")
    assert cpu_library.load.__wrapped__() is None and not caplog.text
