"""Tokenised data that several processes want at once is made by one of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tunesmith.text.encoding import EncodedRows
from tunesmith.text.store import StoreWriter, cached_store

KEY = "some-content"


def _one_document(writer: StoreWriter) -> dict[str, Any]:
    one = np.ones(3, dtype=np.int32)
    rows = EncodedRows(
        tokens=one,
        trained=one.astype(bool),
        lengths=np.array([3], dtype=np.int64),
        places=np.array([1], dtype=np.int64),
        hashes=np.array([7], dtype=np.uint64),
        **_counts(),
    )
    writer.append(rows, 0)
    return {"files": ["a"]}


def _counts() -> dict[str, Any]:
    """What EncodedRows holds besides its arrays, and a store does not keep."""
    arrays = {"tokens", "trained", "lengths", "places", "hashes"}
    return {name: [] for name in EncodedRows.__dataclass_fields__ if name not in arrays}


def _want(folder: str, started: Any, out: Any, dies: bool) -> None:
    os.environ["XDG_CACHE_HOME"] = folder

    def write(writer: StoreWriter) -> dict[str, Any]:
        (Path(folder) / f"made-by-{os.getpid()}").touch()
        started.set()
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.5)
        return _one_document(writer)

    store, was_there = cached_store(KEY, write)
    out.put((len(store), was_there))


@pytest.fixture
def processes(tmp_path: Path) -> Any:
    context = multiprocessing.get_context("spawn")
    return context, context.Event(), context.Queue(), str(tmp_path)


def test_the_first_makes_it_and_the_others_wait(processes: Any, tmp_path: Path) -> None:
    context, started, out, folder = processes
    children = [context.Process(target=_want, args=(folder, started, out, False)) for _ in range(3)]
    for child in children:
        child.start()
    outcomes = sorted(out.get(timeout=60) for _ in children)
    for child in children:
        child.join()
    assert outcomes == [(1, False), (1, True), (1, True)]
    assert len(list(tmp_path.glob("made-by-*"))) == 1


def test_one_that_is_killed_lets_another_go_on(processes: Any, tmp_path: Path) -> None:
    context, started, out, folder = processes
    first = context.Process(target=_want, args=(folder, started, out, True))
    first.start()
    assert started.wait(60)
    second = context.Process(target=_want, args=(folder, started, out, False))
    second.start()
    assert out.get(timeout=60) == (1, False)
    first.join()
    second.join()
    assert first.exitcode == -signal.SIGKILL
