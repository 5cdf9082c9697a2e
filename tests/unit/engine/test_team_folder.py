"""Folders of engines that were killed go with the next start, and no others do."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tunesmith.engine.team_folder import TeamFolder, remove_left_behind

OWNER = """
import sys, tempfile
tempfile.tempdir = sys.argv[1]
from tunesmith.engine.team_folder import TeamFolder
folder = TeamFolder()
print(folder.name, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_what_a_killed_process_left_goes_with_the_next_start(temporary: Path) -> None:
    """Such folders stayed for good: nobody cleans up after `kill -9`."""
    command = [sys.executable, "-c", OWNER, str(temporary)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        left = Path(process.stdout.readline().strip())
        (left / "rank-1.log").write_text("hello")
        assert remove_left_behind(temporary) == []  # its owner lives
        process.kill()
        process.wait()
    assert (left / "rank-1.log").exists()
    folder = TeamFolder()
    assert not left.exists()
    assert list(temporary.iterdir()) == [Path(folder.name)]
    folder.cleanup()
    folder.cleanup()
    assert list(temporary.iterdir()) == []


def test_what_is_in_use_or_somebody_elses_stays(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = TeamFolder(), TeamFolder()
    silent, elsewhere = temporary / "tunesmith-team-silent", temporary / "elsewhere"
    for folder in (silent, elsewhere):
        folder.mkdir()
    (elsewhere / "owner").touch()
    (temporary / "tunesmith-team-link").symlink_to(elsewhere)
    (temporary / "tunesmith-team-file").touch()
    before = sorted(temporary.iterdir())
    assert remove_left_behind(temporary) == []
    assert sorted(temporary.iterdir()) == before
    os.close(first._lock)  # as if its process had ended
    first._lock = -1
    with monkeypatch.context() as context:
        context.setattr(os, "getuid", lambda: -5)
        assert remove_left_behind(temporary) == []
    assert remove_left_behind(temporary) == [Path(first.name)]
    second.cleanup()
    first.cleanup()
