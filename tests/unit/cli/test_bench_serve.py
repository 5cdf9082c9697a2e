"""`tunesmith bench serve` as it is typed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tunesmith.bench.serve.measures import summarise
from tunesmith.bench.serve.record import Record
from tunesmith.bench.serve.run import ServeBench, ServeResult
from tunesmith.cli import bench_serve
from tunesmith.cli.bench_watch import progress_line
from tunesmith.cli.main import run
from tunesmith.report.write import write_report

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = """
import http.server, json, sys
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def answer(self, body):
        self.send_response(200); self.send_header("content-length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        self.answer(json.dumps({"data": [{"id": "stub", "max_model_len": 40}]}).encode())
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        event = {"choices": [{"text": "x", "finish_reason": "length"}]}
        stream = f"data: {json.dumps(event)}\\n\\ndata: [DONE]\\n\\n"
        self.answer((stream if asked.get("stream") else json.dumps(event)).encode())
    def log_message(self, *args): pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""

HANG_AT_THE_SECOND = """
        Handler.streams = getattr(Handler, "streams", 0) + bool(asked.get("stream"))
        if Handler.streams == 2:
            import pathlib, time
            pathlib.Path(__file__).with_suffix(".hangs").touch()
            time.sleep(60)
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", "1"], "name one server"),
        (["builtin:tiny", "--url", "http://x", "--rate", "1"], "name one server"),
        (["--url", "x:8000", "--rate", "1"], "must begin with http"),
        (["--start", "serve it", "--rate", "1"], "{port}"),
        (["builtin:tiny", "--rate", "fast"], "numbers above 0"),
        (["builtin:tiny", "--rate", "0"], "numbers above 0"),
        (["builtin:tiny", "--concurrency", "1.5"], "whole ones"),
        (["builtin:tiny", "--concurrency", "inf"], "numbers above 0"),
        (["builtin:tiny", "--rate", "1", "--slo", "tfft:1s"], "did you mean 'ttft'"),
        (["builtin:tiny", "--rate", "1", "--prompt-tokens", "9..3"], "FROM..TO"),
        (["builtin:tiny", "--rate", "1", "--workload", "sharegtp"], "did you mean 'sharegpt'"),
        (["builtin:tiny", "--rate", "1", "--workload", "azure"], "--data"),
        (["builtin:tiny", "--rate", "1", "--language", "fr"], "not one of auto, en, zh"),
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
    assert run(["bench", "serve", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "runs").exists()


def test_a_server_is_started_loaded_and_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "server.py"
    script.write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    typed = ["--start", f"{sys.executable} {script} {{port}}", "--rate", "inf", "--num", "3", "--no-report"]
    typed += ["--prompt-tokens", "4..8", "--output-tokens", "1", "--warmup", "0", "--slo", "e2e:30s", "--json"]
    monkeypatch.setattr(sys, "argv", ["tunesmith", "bench", "serve", *typed, "--api-key", "hidden"])
    assert run(["bench", "serve", *typed, "--api-key", "hidden"]) == 0
    (point,) = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["points"]
    assert point["name"] == "rate-inf" and point["completed"] == 3
    assert point["goodput"]["good_ratio"] == 1.0
    assert not any("hidden" in file.read_text() for file in (tmp_path / "runs").rglob("*.json"))


def test_a_stop_ends_the_server_too(tmp_path: Path) -> None:
    """SIGTERM in the middle of a load: the server that was started is gone, the run directory says so, and keeps the
    requests that had ended."""
    script = tmp_path / "server.py"
    script.write_text(SCRIPT.replace("        event = ", HANG_AT_THE_SECOND + "        event = "))
    command = [sys.executable, "-m", "tunesmith", "bench", "serve", "--start", f"{sys.executable} {script} {{port}}"]
    command += [
        "--concurrency",
        "1",
        "--num",
        "9",
        "--prompt-tokens",
        "4",
        "--warmup",
        "0",
        "--output",
        str(tmp_path / "run"),
    ]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not script.with_suffix(".hangs").exists():
            time.sleep(0.05)
        (server,) = _children(process.pid)
        process.terminate()
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 143, said
    assert f"tunesmith report {tmp_path / 'run'}" in " ".join(said.split())
    (cell,) = (tmp_path / "run" / "cells").glob("*.json")
    kept = json.loads(cell.read_text())
    assert kept["status"] == "interrupted" and kept["measures"]["completed"] == 1
    assert "stopped early" in write_report([tmp_path / "run"]).markdown.read_text(encoding="utf-8")
    assert not psutil.pid_exists(server)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"


def _children(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children()]


def test_loads_and_lengths() -> None:
    assert [point.name for point in bench_serve.points("1 2,inf", "8", "2")] == [
        "rate-1", "rate-2", "rate-inf", "concurrency-8", "replay-2",
    ]  # fmt: skip
    assert bench_serve.points(None, None, None) == ()
    assert bench_serve.span("7") == (7, 7) and bench_serve.span("2..9") == (2, 9)


def test_how_far_a_load_is() -> None:
    done = Record(0, 0.0, 0.0, contents_s=[0.1, 0.2], ended_s=0.2, output_tokens=2)
    failed = Record(1, 0.0, 0.0, error="503: full")
    assert progress_line("rate-2", 9, [done, failed], 3.0) == (
        "rate-2: 2 of 9 requests, TTFT p50 100 ms, TPOT p50 100 ms, 1 failed (3 s)"
    )
    assert progress_line("rate-2", 9, [], 3.0) == "rate-2: 0 of 9 requests (3 s)"


def test_loads_without_one_answer_are_an_error_and_no_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page's title was the JSON that the server had refused every request with."""
    asked: list[ServeBench] = []
    refused = Record(0, 0.0, 0.0, error="400: the prompt is too long")

    def fail(bench: ServeBench, **_: Any) -> ServeResult:
        asked.append(bench)
        reason = f"no request was answered: {refused.error}"
        cell = {"name": "concurrency-1", "status": "failed", "reason": reason, "client": {"saturated": None}}
        return ServeResult(tmp_path / "run", ({**cell, "measures": summarise([refused])},))

    monkeypatch.setattr("tunesmith.bench.serve.run.bench_serve", fail)
    assert run(["bench", "serve", "--url", "http://127.0.0.1:9"]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "error: no request was answered: 400: the prompt is too long" in said and str(tmp_path / "run") in said
    assert [point.name for point in asked[0].points] == ["concurrency-1", "concurrency-4"]
    assert asked[0].workload.count == 16 and asked[0].workload.is_quick
