"""An engine's process and what is heard of it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tunesmith.bench.infer import protocol
from tunesmith.bench.infer.processes import run_runner
from tunesmith.bench.infer.staging import stage_runners
from tunesmith.bench.infer.workload import InferWorkload, make_job_measures

SLEEP_S = 0.03


class Sleeper:
    """Takes SLEEP_S for each token, and gives one too few where it is asked for three."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        self.job = job

    def generate(self, prompts: Sequence[Sequence[int]], outputs: Sequence[int]) -> list[int]:
        time.sleep(SLEEP_S * max(outputs))
        return [2 if wanted == 3 else wanted for wanted in outputs]

    def facts(self) -> dict[str, Any]:
        return {"weights_bytes": 7}


def test_times_are_those_of_the_engine() -> None:
    said: list[tuple[str, dict[str, Any]]] = []
    workload = InferWorkload(
        kinds=("latency", "throughput"), latency_tokens=(4, 5), requests=2, lengths=(3, 3), samples=2
    )
    began_s = time.perf_counter()
    facts = protocol.run(
        Sleeper, make_job_measures(workload, 100), lambda event, **fields: said.append((event, fields))
    )
    assert facts == {"weights_bytes": 7}
    assert [event for event, _ in said] == ["ready", "first_token", "sample", "sample", "sample"]
    latency = said[2][1]
    assert latency["measure"] == "latency" and latency["short"] == 0 and latency["output_tokens"] == 5
    taken_s = time.perf_counter() - began_s
    assert SLEEP_S <= latency["first_s"] <= taken_s and 5 * SLEEP_S <= latency["whole_s"] <= taken_s
    throughput = said[4][1]
    assert throughput["requests"] == 2 and throughput["short"] == 2 and throughput["output_tokens"] == 4


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (protocol.MissingError("no x"), "missing"),
        (protocol.NotApplicableError("no fp8"), "not_applicable"),
        (RuntimeError("CUDA out of memory. Tried"), "out_of_memory"),
        (KeyError("x"), "failed"),
    ],
)
def test_errors_have_a_status(error: Exception, status: str) -> None:
    assert protocol.explain(error)[0] == status


def _heard(code: str, timeout_s: float = 20.0) -> Any:
    return run_runner([sys.executable, "-c", code], {"x": 1}, environment={}, timeout_s=timeout_s)


def test_what_a_process_says_has_times() -> None:
    code = (
        "import json, sys, time\n"
        "print('noise'); print(json.dumps({'event': 'started'}), flush=True)\n"
        "job = json.loads(sys.stdin.read()); time.sleep(0.2); block = bytearray(50_000_000); time.sleep(0.4)\n"
        "print(json.dumps({'event': 'done', 'facts': job}), flush=True)"
    )
    for _ in range(5):  # who listens may stand still: late with the first, never early with the last
        heard = _heard(code)
        assert heard.status == "ok" and heard.event("done")["facts"] == {"x": 1}
        assert 0.6 <= heard.at_s["done"] <= heard.wall_s
        if heard.at_s["done"] - heard.at_s["started"] >= 0.5 and heard.resident_peak_bytes > 50e6:
            break
    assert heard.at_s["done"] - heard.at_s["started"] >= 0.5
    assert heard.resident_peak_bytes > 50e6


def test_a_process_that_ends_badly_says_why() -> None:
    assert _heard("raise SystemExit('no room for x')").reason.endswith("no room for x")
    killed = _heard("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert killed.status == "killed" and "SIGKILL" in killed.reason
    late = _heard("import time; time.sleep(60)", timeout_s=0.4)
    assert late.status == "timeout" and late.wall_s < 50
    absent = run_runner(["/no/such/python"], {}, environment={}, timeout_s=1)
    assert absent.status == "missing"


def test_staged_runners_need_no_tunesmith(tmp_path: Path) -> None:
    folder = stage_runners(tmp_path / "runners")
    code = (
        "import sys, tunesmith, importlib\n"
        f"assert tunesmith.__file__.startswith({str(folder)!r})\n"
        "for name in ('vllm', 'vllm_cpu', 'transformers', 'transformers_continuous', 'llama_cpp', 'gguf_file'):\n"
        "    importlib.import_module('tunesmith.bench.infer.peers.' + name)\n"
        "assert not {'torch', 'numpy', 'transformers', 'pydantic'} & sys.modules.keys()"
    )
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
