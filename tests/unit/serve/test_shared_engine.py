"""An engine whose model other processes share: one that is gone ends it at once, and everybody hears why."""

from __future__ import annotations

from typing import Any

import pytest
from serve_fakes import Served, error_of, in_server

from tunesmith.engine.tensor_parallel import TensorParallelRunner
from tunesmith.errors import ParallelError
from tunesmith.serve import client as client_module

GONE = "process 1 of the 2 that share the model ended (exit code -9)"


@pytest.fixture(autouse=True)
def _quick_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_FIRST_BACKOFF_S", 0.2)


def gone(*_: Any) -> bool:
    raise ParallelError(GONE)


@in_server()
async def test_the_first_step_that_notices_is_the_last(one: Served) -> None:
    """It used to serve a second request, which failed too, before the engine was started again."""
    one.fake.step = gone  # type: ignore[assignment,method-assign]
    assert GONE in error_of(await one.chat(), 500)["message"]
    assert GONE in error_of(await one.client.get("/health"), 503)["message"]
    await one.until(lambda: len(one.fakes) == 2 and one.server.engine.status == "ready")
    assert (await one.chat()).status_code == 200


@in_server()
async def test_it_is_noticed_while_nothing_runs(one: Served) -> None:
    """/health used to be 200 until somebody asked for something."""
    one.fake.idle = gone  # type: ignore[method-assign]
    await one.until(lambda: one.server.engine.status == "restarting")
    assert GONE in error_of(await one.client.get("/health"), 503)["message"]
    await one.until(lambda: len(one.fakes) == 2 and one.server.engine.status == "ready")


def test_idle_moments_look_after_the_other_processes() -> None:
    runner = object.__new__(TensorParallelRunner)
    runner.check = gone  # type: ignore[assignment]
    with pytest.raises(ParallelError, match="exit code -9"):
        runner.idle()
