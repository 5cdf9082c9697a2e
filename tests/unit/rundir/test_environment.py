"""The environment's fingerprint: plain data, and no CUDA context."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tunesmith.rundir import environment
from tunesmith.rundir.environment import environment_fingerprint, git_commit


def test_the_fingerprint_is_json_and_says_what_this_is() -> None:
    facts = environment_fingerprint()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["python"] == platform.python_version()
    # The wheel of a CUDA build calls itself by the plain number where the module adds +cu130.
    assert facts["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert facts["memory_bytes"] > 10**8
    assert facts["cpu"]["usable_cores"] >= 1


def test_it_starts_no_cuda() -> None:
    environment_fingerprint()
    if not torch.cuda.is_available():
        assert not torch.cuda.is_initialized()
        return
    program = (
        "import torch; from tunesmith.rundir.environment import environment_fingerprint as f; f();"
        "print(torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_outside_a_checkout_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "a" / "b" / "environment.py"))
    assert git_commit() is None


def test_an_archive_of_git_carries_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    monkeypatch.setattr(environment, "__file__", str(folder / "environment.py"))
    (folder / "commit.txt").write_text("$Format:%H$\n", encoding="utf-8")
    assert git_commit() is None
    (folder / "commit.txt").write_text(f"{'0123456789' * 4}\n", encoding="utf-8")
    assert git_commit() == {"commit": "0123456789" * 4, "dirty": None}


def test_the_file_that_archives_fill_in_is_there() -> None:
    package = Path(environment.__file__).resolve()
    assert package.with_name("commit.txt").read_text(encoding="utf-8").strip() == "$Format:%H$"
    attributes = (package.parents[2] / ".gitattributes").read_text(encoding="utf-8")
    assert "tunesmith/rundir/commit.txt export-subst" in attributes


def test_in_a_checkout_the_commit_is_named_and_a_change_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    (tmp_path / "f").write_text("1", encoding="utf-8")
    for command in (["init", "-q"], ["add", "f"], ["commit", "-qm", "x", "--no-verify"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "a" / "b" / "environment.py"))
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert git_commit() == {"commit": head, "dirty": False}
    (tmp_path / "f").write_text("2", encoding="utf-8")
    assert git_commit() == {"commit": head, "dirty": True}
