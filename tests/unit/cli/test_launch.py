"""`tunesmith launch`: mistakes that are told before a process is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.cli.main import run


@pytest.mark.parametrize(
    ("typed", "right"),
    [
        ("train r.yaml --dry-run", "--dry-run train r.yaml"),
        ("train r.yaml --nproc 2 --cpu --set train.epochs=1", "--nproc 2 --cpu train r.yaml --set train.epochs=1"),
        ("--cpu train r.yaml --nproc=2", "--nproc=2 train r.yaml"),
    ],
)
def test_options_of_launch_behind_train_are_put_right(
    typed: str, right: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was "there is no option --dry-run, did you mean '--run-dir'?; see: tunesmith train --help"."""
    assert run(["launch", *typed.split()]) == 2
    assert (
        capsys.readouterr()
        .err.strip()
        .endswith(f"options of launch stand before train; type: tunesmith launch {right}")
    )


def test_options_of_train_and_of_scripts_stay_where_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "own.py"
    script.write_text("", encoding="utf-8")
    assert run(["launch", "--dry-run", "--nproc", "2", "--cpu", str(script), "--time", "3", "--cpu"]) == 0
    assert f"{script} --time 3 --cpu" in capsys.readouterr().out
    recipe = tmp_path / "r.yaml"
    recipe.write_text("data: {train: [builtin:shop]}\n", encoding="utf-8")
    folder = str(tmp_path / "run")
    assert run(["launch", "--dry-run", "--nproc", "2", "--cpu", "train", str(recipe), "--run-dir", folder]) == 0
    assert folder in capsys.readouterr().out
