"""A serving run from its settings to its page."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from tunesmith.bench.serve.arrivals import Point
from tunesmith.bench.serve.measures import parse_slo
from tunesmith.bench.serve.run import ServeBench, bench_serve
from tunesmith.bench.serve.target import find_target, normal_url
from tunesmith.bench.serve.workload import Workload
from tunesmith.errors import RecipeError, TunesmithError
from tunesmith.report.write import write_report

SMALL = Workload(count=4, prompt_tokens=(4, 6), output_tokens=(2, 3))
SCRIPT = """
import http.server, json, sys
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    asked = 0  # the first real request is refused: the model is still being loaded
    def do_GET(self):
        body = json.dumps({"data": [{"id": "stub"}]}).encode()
        self.send_response(200); self.send_header("content-length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        event = {"choices": [{"text": "x", "finish_reason": "length"}]}
        body = f"data: {json.dumps(event)}\\n\\ndata: [DONE]\\n\\n".encode()
        if not asked.get("stream"):
            body = json.dumps(event).encode()
            Handler.asked += 1
        self.send_response(503 if Handler.asked == 1 and not asked.get("stream") else 200)
        self.send_header("content-length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args): pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def _bench(server: Any, *points: Point, **changes: Any) -> ServeBench:
    return ServeBench(points=points, url=server.url, **{"workload": SMALL, "warmup": 2, **changes})


def test_a_run_and_its_page(known_server: Any, tmp_path: Path) -> None:
    known_server.first_s = 0.01
    points = (Point("open", 50.0), Point("open", math.inf), Point("closed", 2))
    bench = _bench(known_server, *points, objectives=parse_slo("ttft:5s"), api_key="hidden-key", repeats=2)
    result = bench_serve(bench, run_dir=tmp_path / "run")
    assert [cell["name"] for cell in result.cells[:3]] == ["rate-50", "rate-inf", "concurrency-2"]
    assert len(result.cells) == 6 and result.num_ok == 6
    cell = json.loads((tmp_path / "run" / "cells" / "rate-inf-0.json").read_text())
    assert cell["measures"]["completed"] == 4 and cell["measures"]["goodput"]["good_ratio"] == 1.0
    assert cell["target"]["model"] == "known" and cell["target"]["version"] == "1.2.3"
    rows = (tmp_path / "run" / "requests" / "rate-inf-0.jsonl").read_text().splitlines()
    assert len(rows) == 4 and json.loads(rows[0])["output_tokens"] in (2, 3)
    assert not any("hidden-key" in file.read_text() for file in (tmp_path / "run").rglob("*.*"))
    # 2 to warm up and 4 to measure, six times; no two prompts of different points begin alike
    assert len(known_server.bodies) == 6 * (2 + 4)
    assert len({tuple(body["prompt"]) for body in known_server.bodies}) == 6 * (2 + 4)
    files = write_report([tmp_path / "run"])
    page, text = files.html.read_text(encoding="utf-8"), files.markdown.read_text(encoding="utf-8")
    assert "all at once" in text and "50 requests/s" in text and "100.0 %" in text
    assert page.count("<svg") >= 3 and "hidden-key" not in page


def test_two_servers_stand_beside_each_other(known_server: Any, tmp_path: Path) -> None:
    points = (Point("open", 20.0), Point("open", 40.0))
    known_server.gap_s = 0.05
    bench_serve(_bench(known_server, *points, name="slow"), run_dir=tmp_path / "slow")
    known_server.gap_s = 0.0
    bench_serve(_bench(known_server, *points, name="quick"), run_dir=tmp_path / "quick")
    for language in ("en", "zh"):
        text = write_report([tmp_path / "quick", tmp_path / "slow"], tmp_path / language, language).markdown
        assert "quick · slow" in text.read_text(encoding="utf-8")
    assert "quick against slow (40 requests/s)" in (tmp_path / "en" / "report.md").read_text(encoding="utf-8")


def test_a_server_that_refuses_everything(known_server: Any, tmp_path: Path) -> None:
    known_server.fail = 500
    result = bench_serve(_bench(known_server, Point("open", math.inf)), run_dir=tmp_path / "run")
    assert result.num_ok == 0 and "no request was answered" in result.cells[0]["reason"]
    assert "4 requests failed" in write_report([tmp_path / "run"]).markdown.read_text(encoding="utf-8")


def test_a_server_is_started_and_ended(tmp_path: Path) -> None:
    script = tmp_path / "server.py"
    script.write_text(SCRIPT)
    start = (sys.executable, str(script), "{port}")
    bench = ServeBench(points=(Point("closed", 2),), workload=SMALL, start=start, warmup=0, start_timeout_s=30)
    result = bench_serve(bench, run_dir=tmp_path / "run")
    assert result.num_ok == 1
    target = result.cells[0]["target"]
    assert target["start_s"] > 0 and target["model"] == "stub"
    with pytest.raises(TunesmithError, match="gives no list of models"):
        find_target(target["url"])


def test_a_server_that_dies_says_why(tmp_path: Path) -> None:
    start = (sys.executable, "-c", "raise SystemExit('no such model {port}')")
    bench = ServeBench(points=(Point("closed", 2),), workload=SMALL, start=start)
    with pytest.raises(TunesmithError, match="no such model"):
        bench_serve(bench, run_dir=tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def test_what_can_not_be_measured_is_refused(known_server: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="name a load"):
        bench_serve(_bench(known_server), run_dir=tmp_path / "run")
    with pytest.raises(RecipeError, match="--url"):
        bench_serve(ServeBench(points=(Point("open", 1.0),)), run_dir=tmp_path / "run")
    with pytest.raises(TunesmithError, match="no model 'other'; it has: known"):
        find_target(known_server.url, "other")
    assert normal_url("http://there/v1/") == "http://there"
    with pytest.raises(RecipeError, match="http"):
        normal_url("there:8000")
