"""Files that are whole or absent."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tunesmith.errors import RunDirError
from tunesmith.rundir import io
from tunesmith.rundir.io import (
    MetricsWriter,
    append_jsonl,
    atomic_directory,
    jsonable,
    read_json,
    read_jsonl,
    remove_leftovers,
    sha256_file,
    system_errors,
    write_json_atomic,
)


def _full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_json_reads_back_with_chinese_and_order(tmp_path: Path) -> None:
    value = {"b": 1, "a": "商店", "c": [1.5, None, True]}
    write_json_atomic(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    assert "商店" in (tmp_path / "x.json").read_text(encoding="utf-8")
    assert list(read_json(tmp_path / "x.json")) == ["b", "a", "c"]


def test_unknown_numbers_become_null() -> None:
    assert jsonable({"a": math.nan, "b": [math.inf, -math.inf, 1.0], 3: Path("x")}) == {
        "a": None,
        "b": [None, None, 1.0],
        "3": "x",
    }


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json_atomic(tmp_path / "x.json", {"old": 1})
    monkeypatch.setattr(io.os, "fsync", _full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_json_atomic(tmp_path / "x.json", {"new": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    assert read_json(tmp_path / "x.json") == {"old": 1}


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b""])
def test_broken_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(RunDirError, match=r"x\.json is not valid JSON"):
        read_json(tmp_path / "x.json")
    with pytest.raises(RunDirError, match="does not exist"):
        read_json(tmp_path / "y.json")


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "out") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("1", encoding="utf-8")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "sub" / "a").read_text(encoding="utf-8") == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("existing", [False, True])
def test_a_directory_that_fails_vanishes(tmp_path: Path, existing: bool) -> None:
    if existing:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "old").touch()
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "out", replace=True) as folder:
        (folder / "half").touch()
        raise KeyboardInterrupt
    assert sorted(p.name for p in tmp_path.rglob("*")) == (["old", "out"] if existing else [])


def test_an_existing_directory_is_exchanged_only_when_asked(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with pytest.raises(RunDirError, match="exists already"), atomic_directory(tmp_path / "out"):
        pass
    with atomic_directory(tmp_path / "out", replace=True) as folder:
        (folder / "new").touch()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["new", "out"]


def test_a_full_disk_at_the_end_keeps_the_old_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with atomic_directory(tmp_path / "out") as folder:
        (folder / "good").touch()
    monkeypatch.setattr(io.os, "fsync", _full_disk)
    with pytest.raises(OSError, match="No space"), atomic_directory(tmp_path / "out", replace=True) as folder:
        (folder / "bad").touch()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["good", "out"]


def test_leftovers_of_the_dead_are_removed_and_of_the_living_kept(tmp_path: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    folder = tmp_path / f".out.tmp-{dead.stdout.strip()}-0123abcd"
    folder.mkdir()
    file = tmp_path / f".x.json.tmp-{dead.stdout.strip()}-0123abcd"
    file.touch()
    mine = tmp_path / f".out.tmp-{os.getpid()}-0123abcd"
    mine.mkdir()
    (tmp_path / ".other.tmp-x").touch()
    assert remove_leftovers(tmp_path) == [folder, file]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([mine.name, ".other.tmp-x"])


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc" * 100_000)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_rows_are_there_when_write_returns(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "m.jsonl") as writer:
        writer.write({"step": 1, "loss": 2.5, "text": "损失\n"})
        assert read_jsonl(tmp_path / "m.jsonl") == [{"step": 1, "loss": 2.5, "text": "损失\n"}]
        writer.write({"step": 2, "loss": math.nan})
    assert read_jsonl(tmp_path / "m.jsonl")[1] == {"step": 2, "loss": None}
    with pytest.raises(ValueError, match="closed"):
        writer.write({})


def test_a_torn_last_line_is_ignored_and_another_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo')
    assert read_jsonl(path) == [{"step": 1}]
    path.write_bytes(b'{"step": 1\n{"step": 2}\n')
    with pytest.raises(RunDirError, match=r"m\.jsonl:1 is not valid JSON"):
        read_jsonl(path)
    path.write_bytes(b"[1]\n")
    with pytest.raises(RunDirError, match=r"m\.jsonl:1 must be a JSON object"):
        read_jsonl(path)


def test_resuming_drops_later_rows_and_the_torn_end(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 2, "validation_loss": 1}\n{"step": 3}\n{"st')
    with MetricsWriter(path, resume_step=2) as writer:
        writer.write({"step": 3, "again": True})
    assert read_jsonl(path) == [
        {"step": 1},
        {"step": 2},
        {"step": 2, "validation_loss": 1},
        {"step": 3, "again": True},
    ]


def test_a_torn_end_is_dropped_before_appending(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st')
    with MetricsWriter(path) as writer:
        writer.write({"step": 2})
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_names_the_file() -> None:
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        append_jsonl(Path("/dev/full"), {"step": 1})


def test_a_row_that_fits_only_in_part_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.jsonl"
    append_jsonl(path, {"step": 1})
    real_write = os.write
    calls: list[int] = []

    def short_write(handle: int, data: bytes) -> int:
        calls.append(len(data))
        if len(calls) > 1:
            _full_disk()
        return real_write(handle, data[:3])

    monkeypatch.setattr(io.os, "write", short_write)
    with pytest.raises(OSError, match="No space"):
        append_jsonl(path, {"step": 2})
    assert path.read_text(encoding="utf-8") == json.dumps({"step": 1}) + "\n"


def test_what_the_system_said_to_a_foreign_writer_is_an_oserror() -> None:
    """Was: a full disk during safetensors' own writing was an unexpected SafetensorError, not a full disk."""
    with pytest.raises(OSError, match="No space left") as caught, system_errors():
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(RuntimeError, match="else"), system_errors():
        raise RuntimeError("something else")
