"""A comparison of engines, from its settings to its page; the engines are made up, the processes are real."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunesmith.bench.infer.compare import InferBench, bench_infer
from tunesmith.bench.infer.table import OURS, _measures, make_table
from tunesmith.bench.infer.workload import InferWorkload
from tunesmith.errors import RecipeError
from tunesmith.report.write import write_report

RUNNER = """
import sys, time
from tunesmith.bench.infer.protocol import MissingError, serve
class Engine:
    def __init__(self, job):
        if job["format"] == "int8" and {token_s} > 0.005:
            raise MissingError("nothing reads int8 here")
        assert job["options"] == {options}, job["options"]
    def generate(self, prompts, outputs):
        time.sleep({token_s} * max(outputs))
        return list(outputs)
    def facts(self):
        return {{"weights_bytes": 1000, "device_peak_bytes": None, "how": "sleeps"}}
if __name__ == "__main__":
    serve(Engine)
"""
WORKLOAD = InferWorkload(
    kinds=("latency", "batches"), latency_tokens=(3, 11), batches=(2,), batch_tokens=(2, 5), samples=2
)


@pytest.fixture
def runners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Ours takes 3 ms for a token, the other 30 ms."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "quick_runner.py").write_text(RUNNER.format(token_s=0.003, options={"max_num_seqs": 4}))
    (folder / "slow_runner.py").write_text(RUNNER.format(token_s=0.03, options={}))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return {OURS: "quick_runner", "slow": "slow_runner"}


def test_a_comparison_and_its_page(runners: dict[str, str], tmp_path: Path) -> None:
    seen = []
    bench = InferBench(
        model="builtin:tiny",
        formats=("bf16", "int8"),
        peers=("slow",),
        workload=WORKLOAD,
        rounds=2,
        options={"max_num_seqs": 4},
    )
    result = bench_infer(bench, run_dir=tmp_path / "run", progress=seen.append, modules=runners)
    assert [cell["name"] for cell in seen[:2]] == ["tunesmith-bf16-0", "slow-bf16-0"]
    assert [cell["engine"] for cell in seen[4:6]] == ["slow", OURS]  # the second round runs backwards
    assert result.ours_measured and len(seen) == 8
    table = json.loads((tmp_path / "run" / "infer.json").read_text())
    assert {"chip", "driver", "torch", "commit", "model", "weights"} == table["key"].keys()
    ours, slow = table["rows"][:2]
    # Sleeping takes longer on a loaded machine, never less; what is told apart is ten times.
    assert ours["measures"]["latency"]["tpot_s"]["median"] >= 0.002
    assert slow["measures"]["latency"]["tpot_s"]["median"] >= 0.025
    assert slow["ours_is"]["latency.tpot_s"] > 1.5
    assert ours["first_token_s"]["median"] > 0.03 and ours["weights_bytes"] == 1000
    missing = table["rows"][3]
    assert (missing["engine"], missing["status"], missing["reason"]) == ("slow", "missing", "nothing reads int8 here")
    text = write_report([tmp_path / "run"]).markdown.read_text(encoding="utf-8")
    assert "slow (missing: nothing reads int8 here)" in text and "× as fast" in text


def test_what_is_not_known_is_refused(tmp_path: Path) -> None:
    for changes, match in (
        ({"peers": ("vlm",)}, "did you mean 'vllm'|vllm"),
        ({"formats": ("int5",)}, "there is no format 'int5'"),
        ({"workload": InferWorkload(kinds=("speed",))}, "there is no measure"),
        ({"weights": "none"}, "--weights"),
        ({"formats": ()}, "at least one format"),
    ):
        with pytest.raises(RecipeError, match=match):
            bench_infer(InferBench(model="builtin:tiny", **changes), run_dir=tmp_path / "run")  # type: ignore[arg-type]


def test_a_table_says_what_failed() -> None:
    cell = {
        "engine": OURS,
        "format": "bf16",
        "status": "out_of_memory",
        "reason": "no room",
        "facts": {},
        "versions": {},
        "samples": [],
    }
    (row,) = make_table([cell])
    assert (row["status"], row["reason"], row["rounds"], row["failed_rounds"]) == ("out_of_memory", "no room", 0, 1)
    assert row["measures"] == {} and row["ours_is"] == {}


def test_a_sample_that_was_faster_than_its_first_token_has_no_time_per_token() -> None:
    """It counted as 0 ms a token, and so did the median of a busy machine."""
    sample = {"measure": "latency", "requests": 1, "output_tokens": 11, "prompt_tokens": 4, "whole_s": 1.0}
    samples = [{**sample, "first_s": 1.5, "short": 0}, {**sample, "first_s": 0.5, "short": 0}]
    measured = _measures([{"samples": samples}])["latency"]
    assert measured["tpot_s"] == {"median": 0.05, "min": 0.05, "max": 0.05, "count": 1}
    assert measured["ttft_s"]["count"] == 2
    assert "tpot_s" not in _measures([{"samples": samples[:1]}])["latency"]
