"""The bench in real processes: ours, transformers + PEFT, one that is missing, one that crashes, one that hangs."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.bench.peers.compare import MODULES, PEERS, _run_turns, compare
from tunesmith.bench.peers.store import load_records
from tunesmith.bench.peers.table import markdown, write_table
from tunesmith.errors import RecipeError
from tunesmith.recipe.schema import Recipe
from tunesmith.train.stopping import sigterm_exits

Make = Callable[..., Recipe]
FAKES = {
    "crashing": "raise SystemExit(7)",
    "missing": (
        "from tunesmith.bench.peers.wire import require, serve\n"
        "serve(lambda job, say: require('no_such_package_here', 'no-such-package'))"
    ),
    "quick": (
        "from tunesmith.bench.peers.wire import serve\n"
        "def run(job, say):\n"
        "    say({'event': 'step', 'seconds': 0.1, 'loss': 1.0, 'grad_norm': 1.0})\n"
        "    return {}\n"
        "serve(run)"
    ),
    "hung": "import time\ntime.sleep(60)",
    "second_hung": (
        "import pathlib, time\n"
        "once = pathlib.Path(__file__).with_suffix('.once')\n"
        "if once.exists():\n"
        "    time.sleep(60)\n"
        "once.touch()"
    ),
}


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages, on every process's path, with runners that don't end well and one that is quick."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for name, source in FAKES.items():
        (folder / f"{name}_peer.py").write_text(source, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


def test_a_row_with_all_kinds_of_peers(peer_recipe: Make, fakes: Path, tmp_path: Path) -> None:
    out, told = tmp_path / "results", []
    modules = {**MODULES, "missing": "missing_peer", "crashing": "crashing_peer"}
    result = compare(
        peer_recipe(),
        ["transformers", "missing", "crashing"],
        rounds=1,
        out=out,
        peer_paths={"missing": fakes, "crashing": fakes},
        progress=lambda row: told.append(row["peer"]),
        modules=modules,
    )
    assert result.ours_measured
    assert told == ["tunesmith", "transformers", "missing", "crashing"]
    assert [row["status"] for row in result.record["rows"]] == ["ok", "ok", "missing", "failed"]
    assert load_records(out) == [json.loads(result.path.read_text("utf-8"))]
    table = write_table(out)
    rows: dict[str, Any] = {row["peer"]: row for row in table["groups"][0]["rows"]}
    assert rows["transformers"]["verdict"] == "equal work"
    assert rows["transformers"]["ours_is_times"] > 0
    assert rows["missing"]["verdict"].startswith("missing: no-such-package is not installed")
    assert rows["crashing"]["verdict"].startswith("failed: the process exited with code 7")
    assert rows["crashing"]["verdict"].endswith("proves nothing")
    assert rows["crashing"]["ours_is_times"] is None
    assert (out / "peers.md").read_text("utf-8") == markdown(table["groups"])


def test_rounds_alternate_and_a_hung_peer_is_a_row(fakes: Path) -> None:
    turns = [(0, "hung"), (0, "crashing"), (1, "hung")]
    modules = {"hung": "hung_peer", "crashing": "crashing_peer"}
    paths = {"hung": fakes, "crashing": fakes}
    rows = _run_turns(turns, {"job": {}}, paths, modules, 1.0, None)
    assert [(row["peer"], row["round"], row["order"]) for row in rows] == [
        ("hung", 0, 0),
        ("crashing", 0, 1),
        ("hung", 1, 2),
    ]
    assert rows[0]["status"] == "timeout"
    assert 1.0 <= rows[0]["wall_s"] < 30


def test_a_run_stopped_in_its_second_round_keeps_the_first(peer_recipe: Make, fakes: Path, tmp_path: Path) -> None:
    """Stopped by SIGTERM while a peer of round 2 runs: that peer's process ends, and round 1 is on disk."""
    out, told = tmp_path / "results", []

    def stop_in_round_2(row: Any) -> None:
        told.append((row["peer"], row["round"]))
        if told[-1] == ("tunesmith", 1):
            threading.Timer(1.5, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()

    began = time.monotonic()
    with sigterm_exits(), pytest.raises(SystemExit) as stopped:
        compare(
            peer_recipe(),
            ["second_hung"],
            rounds=2,
            out=out,
            peer_paths={"second_hung": fakes},
            progress=stop_in_round_2,
            modules={"tunesmith": "quick_peer", "second_hung": "second_hung_peer"},
        )
    assert stopped.value.code == 143
    assert told == [("tunesmith", 0), ("second_hung", 0), ("tunesmith", 1)]
    assert time.monotonic() - began < 60
    (record,) = load_records(out)
    assert (record["rounds"], record["rounds_asked"]) == (1, 2)
    assert [(row["peer"], row["order"], row["status"]) for row in record["rows"]] == [
        ("tunesmith", 0, "ok"),
        ("second_hung", 1, "failed"),
    ]


def test_whole_rounds_go_into_one_record(fakes: Path, peer_recipe: Make, tmp_path: Path) -> None:
    modules = {"tunesmith": "quick_peer", "crashing": "crashing_peer"}
    result = compare(peer_recipe(), ["crashing"], rounds=2, out=tmp_path, modules=modules)
    assert load_records(tmp_path) == [json.loads(result.path.read_text("utf-8"))]
    assert [(row["round"], row["order"]) for row in result.record["rows"]] == [(0, 0), (0, 1), (1, 2), (1, 3)]
    assert result.record["key"]["timing"] == "each step from idle to idle"


def test_an_unknown_peer_is_refused_before_anything_runs(peer_recipe: Make, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"there is no peer 'ligr'.*liger"):
        compare(peer_recipe(), ["ligr"], out=tmp_path)
    with pytest.raises(RecipeError, match="there is no peer 'trll'"):
        compare(peer_recipe(), [], out=tmp_path, peer_paths={"trll": tmp_path})


def test_every_peer_has_its_runner() -> None:
    from importlib.util import find_spec

    assert set(MODULES) == {"tunesmith", *PEERS}
    assert all(find_spec(module) is not None for module in MODULES.values())
