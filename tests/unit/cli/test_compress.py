"""`tunesmith compress` as a person types it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tunesmith.cli.main import run


def test_a_model_is_compressed_and_answers(tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import tunesmith

    text = data_dir / "tinystories_sample" / "tinystories_v2_sample_4KB.txt"
    output = tmp_path / "small"
    options = ["--format", "int4-g32", "--calibration", "gptq", "--calibration-text", str(text), "--device", "cpu"]
    assert run(["compress", "builtin:tiny", "--output", str(output), *options, "--json"]) == 0
    said = capsys.readouterr()
    report: dict[str, Any] = json.loads(said.out.splitlines()[-1])
    assert report["kl"] < 0.5 and report["bytes_after"] < report["bytes_before"]
    assert "% of" in said.err
    section = json.loads((output / "config.json").read_text())["quantization_config"]
    assert (section["quant_method"], section["calibration"]) == ("tunesmith", "gptq")
    assert run(["compress", "builtin:tiny", "--output", str(output)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert tunesmith.__version__


def test_a_run_is_led_to_what_of_it_can_be_compressed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It was "has no config.json: name a Hugging Face model directory"."""
    (tmp_path / "run" / "final").mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text("{}")
    arguments = ["compress", str(tmp_path / "run"), "--output", str(tmp_path / "x")]
    assert run(arguments) == 2
    assert f"tunesmith merge {tmp_path / 'run'} --output DIR" in capsys.readouterr().err
    (tmp_path / "run" / "final" / "config.json").write_text("{}")
    assert run(arguments) == 2
    assert f"name the model that came out of it: {tmp_path / 'run' / 'final'}" in capsys.readouterr().err


def test_a_misspelt_format_names_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compress", "builtin:tiny", "--output", str(tmp_path / "x"), "--format", "int4-g46"]) == 2
    assert "did you mean 'int4-g64'" in capsys.readouterr().err


def test_a_short_text_calibrates_too_and_too_short_a_one_says_what_is_wanted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a text with 318 tokens it said "wants two pieces of 64 at least"."""
    text = tmp_path / "text.txt"
    arguments = [
        "compress",
        "builtin:tiny",
        "--calibration",
        "gptq",
        "--device",
        "cpu",
        "--calibration-text",
        str(text),
    ]
    output = tmp_path / "small"
    assert run([*arguments, "--output", str(output)]) == 2
    assert f"the text {text} can't be read: No such file or directory" in capsys.readouterr().err
    text.write_text("We open at nine. " * 10, encoding="utf-8")
    assert run([*arguments, "--output", str(output)]) == 2
    assert "tokens: calibration wants 128 at least" in capsys.readouterr().err
    text.write_text("We open at nine. " * 60, encoding="utf-8")
    assert run([*arguments, "--output", str(output)]) == 0
    assert "On held-out text" in capsys.readouterr().err
