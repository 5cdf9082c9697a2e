"""A server whose model two processes share: one that dies, one that stands still, SIGTERM to all of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

START_S = 180.0
LONG = {"model": "builtin:tiny", "prompt": "Once upon a time", "max_tokens": 400, "temperature": 0, "ignore_eos": True}


class SharedServer:
    """`tunesmith serve builtin:tiny --tensor-parallel-size 2`: HTTP process, engine, and a process that shares it."""

    def __init__(self, directory: Path) -> None:
        self.log = directory / "server.log"
        command = [sys.executable, "-m", "tunesmith", "serve", "builtin:tiny", "--port", "0", "--json"]
        command += ["--tensor-parallel-size", "2", "--quantization", "w8a8", "--shutdown-timeout", "300"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self.process.stdout is not None
        timer = threading.Timer(START_S, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        assert line, self.log.read_text()
        self.client = httpx.Client(base_url=json.loads(line)["url"].removesuffix("/v1"), timeout=120)

    def family(self) -> tuple[psutil.Process, psutil.Process]:
        """The engine's process, and the one that shares the model with it."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        named = {" ".join(child.cmdline()): child for child in children}
        (engine,) = (child for line, child in named.items() if "tunesmith.serve.worker" in line)
        (other,) = (child for line, child in named.items() if "tunesmith.engine.tensor_worker" in line)
        return engine, other

    def is_healthy(self) -> bool:
        return self.client.get("/health").status_code == 200

    def answer(self, **changes: Any) -> httpx.Response:
        return self.client.post("/v1/completions", json={**LONG, "max_tokens": 8, **changes})

    def restarted(self, before: tuple[psutil.Process, psutil.Process]) -> None:
        """Those before are gone, and others answer."""
        until(lambda: not any(alive(one) for one in before), "the processes before are gone")
        until(self.is_healthy, "another engine is there")
        assert not {one.pid for one in self.family()} & {one.pid for one in before}
        assert self.answer().status_code == 200

    def end(self) -> None:
        """At once, if it is there."""
        self.client.close()
        self.process.kill()
        self.process.communicate()


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def until(holds: Callable[[], bool], what: str, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedServer]:
    one = SharedServer(tmp_path_factory.mktemp("shared"))
    yield one
    everyone = one.family()
    one.end()
    until(lambda: not any(alive(process) for process in everyone), "a server that is gone takes all with it")


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_process_that_dies_in_a_request(server: SharedServer) -> None:
    """Who waits is told, /health says what happened until another engine is there."""
    before = server.family()
    said: list[str] = []
    with server.client.stream("POST", "/v1/completions", json={**LONG, "stream": True, "max_tokens": 1500}) as answer:
        for line in answer.iter_lines():
            if not said:
                before[1].kill()
            said += [line] if line else []
    assert "error" in said[-2] and said[-1] == "data: [DONE]", said[-3:]
    refused = server.client.get("/health")
    assert refused.status_code == 503
    assert "process 1 of the 2 that share the model ended" in refused.text
    server.restarted(before)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_process_that_dies_while_nothing_runs(server: SharedServer) -> None:
    before = server.family()
    before[1].kill()
    until(lambda: not server.is_healthy(), "nobody asked for anything, and /health is not true any longer", 20)
    server.restarted(before)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_process_that_stands_still(server: SharedServer) -> None:
    """/health does not claim progress; an engine that is killed for it takes even a stopped process with it."""
    before = server.family()
    before[1].suspend()
    asking = threading.Thread(target=_ask, args=(server,), daemon=True)
    asking.start()
    until(lambda: not server.is_healthy(), "the engine makes no progress", 60)
    before[0].kill()
    asking.join(60)
    assert not asking.is_alive()
    server.restarted(before)


def _ask(server: SharedServer) -> None:
    with contextlib.suppress(httpx.HTTPError):
        server.answer()


@pytest.mark.long
@pytest.mark.timeout(600)
def test_sigterm_to_all_processes_lets_answers_end(tmp_path: Path) -> None:
    """As a service manager sends it: what runs is answered whole, then all processes leave."""
    server = SharedServer(tmp_path)
    try:
        engine, other = server.family()
        said: list[str] = []
        with server.client.stream("POST", "/v1/completions", json={**LONG, "stream": True, "max_tokens": 60}) as answer:
            for line in answer.iter_lines():
                if not said:
                    for pid in (other.pid, engine.pid, server.process.pid):
                        os.kill(pid, signal.SIGTERM)
                said += [line] if line else []
        assert said[-1] == "data: [DONE]" and not any("error" in line for line in said), said[-3:]
        assert server.process.wait(60) == 0, server.log.read_text()
        until(lambda: not alive(engine) and not alive(other), "nobody is left behind", 20)
    finally:
        server.end()
