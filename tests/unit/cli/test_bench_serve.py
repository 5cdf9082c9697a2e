"""`tunesmith bench serve` as it is typed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tunesmith.cli import bench_serve
from tunesmith.cli.main import run

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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["builtin:tiny"], "name a load"),
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
        (["builtin:tiny", "--rate", "1", "--language", "fr"], "not one of en, zh"),
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
    """SIGTERM in the middle of a load: the server that was started is gone, the run directory says so."""
    script = tmp_path / "server.py"
    script.write_text(
        SCRIPT.replace(
            "self.answer((stream", "import time; time.sleep(60) if asked.get('stream') else 0; self.answer((stream"
        )
    )
    command = [sys.executable, "-m", "tunesmith", "bench", "serve", "--start", f"{sys.executable} {script} {{port}}"]
    command += [
        "--concurrency",
        "1",
        "--num",
        "1",
        "--prompt-tokens",
        "4",
        "--warmup",
        "0",
        "--output",
        str(tmp_path / "run"),
    ]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        requests = tmp_path / "run" / "requests"
        while process.poll() is None and not (requests.exists() and _children(process.pid)):
            time.sleep(0.05)
        time.sleep(1.0)
        (server,) = _children(process.pid)
        process.terminate()
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 143, said
    assert "tunesmith report" in said
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
