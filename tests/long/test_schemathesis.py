"""No request that the OpenAPI document allows or forbids breaks the server: 50 a route here, 10,000 in the campaign."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "unit" / "serve")]
RESULTS = HERE.parents[1] / "build" / "test-long"
CASES = 50


@contextlib.contextmanager
def _fake_server() -> Iterator[str]:
    """The application with a fake engine, on a socket of this process."""
    import uvicorn
    from serve_fakes import served

    listening = socket.create_server(("127.0.0.1", 0))
    stop = threading.Event()

    async def main() -> None:
        async with served() as one:
            server = uvicorn.Server(uvicorn.Config(one.app, log_level="error", lifespan="off"))
            serving = asyncio.create_task(server.serve(sockets=[listening]))
            while not stop.is_set():
                await asyncio.sleep(0.05)
            server.should_exit = True
            await serving

    # Signal handlers belong to the main thread; uvicorn leaves them alone elsewhere.
    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        stop.set()
        thread.join(20)
        listening.close()


@pytest.mark.filterwarnings("ignore")
def test_fifty_cases_a_route() -> None:
    pytest.importorskip("schemathesis")
    import schemathesis_campaign as campaign

    with warnings.catch_warnings(), _fake_server() as url:
        warnings.simplefilter("ignore")
        found = campaign.fuzz(url, "tiny", CASES)
    result = campaign.summarise(found, 0.0)
    assert result["server_errors"] == 0, json.dumps([one.server_errors for one in found if one.server_errors], indent=1)
    assert result["passed"], json.dumps([one.not_as_documented for one in found if one.not_as_documented], indent=1)
    posts = [one for one in found if one.route.startswith("POST")]
    assert posts and all(one.cases == CASES // 2 for one in posts)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_ten_thousand_cases() -> None:
    out = RESULTS / "schemathesis"
    command = [sys.executable, str(HERE / "schemathesis_campaign.py"), "--cases", "10000", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=7000)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((out / "schemathesis.json").read_text(encoding="utf-8"))["cases"] >= 10000
