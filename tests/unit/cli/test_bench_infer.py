"""`tunesmith bench infer` as it is typed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tunesmith.bench.infer import compare
from tunesmith.cli.main import run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--formats", "int5"], "there is no format 'int5'"),
        (["--peers", "vlm"], "there is no peer 'vlm'"),
        (["--measures", "speed"], "there is no measure 'speed'"),
        (["--prefill", "32"], "as 32x2048"),
        (["--batches", "1,x"], "--batches is numbers"),
        (["--weights", "none"], "--weights is"),
        (["--peer-python", "vllm"], "NAME=PATH"),
        (["--option", "max_num_seqs"], "KEY=VALUE"),
        (["--language", "fr"], "not one of auto, en, zh"),
    ],
)
def test_mistakes_of_use(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["bench", "infer", "builtin:tiny", "--device", "cpu", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "runs").exists()


def test_what_is_typed_is_what_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data_dir: Path) -> None:
    """A recipe names the model; questions come in the model's own tokens; options go to whom they are for."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("version: 1\nmodel:\n  path: builtin:tiny\n  weights: random\n", encoding="utf-8")
    asked: list[compare.InferBench] = []

    def bench_infer(bench: compare.InferBench, **_: Any) -> compare.InferResult:
        asked.append(bench)
        return compare.InferResult(tmp_path, (), ())

    monkeypatch.setattr(compare, "bench_infer", bench_infer)
    typed = [str(recipe), "--device", "cpu", "--measures", "latency", "--data", str(data_dir / "gsm8k"), "--no-report"]
    typed += ["--option", "max_num_seqs=4", "--option", "vllm:enforce_eager=true", "--option", "kv_cache_dtype=fp8"]
    assert run(["bench", "infer", *typed]) == 0
    (bench,) = asked
    assert (bench.model, bench.weights, bench.device) == ("builtin:tiny", "random", "cpu")
    assert bench.options == {"max_num_seqs": 4, "kv_cache_dtype": "fp8"}
    assert bench.peer_options == {"vllm": {"enforce_eager": True}}
    assert len(bench.workload.questions) == 16 and all(len(ids) > 10 for ids in bench.workload.questions)
