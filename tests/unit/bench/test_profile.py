"""The profiler's files, and a timeline that sees a known allocation."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable

import pytest
import torch

from tunesmith.bench.profile import profile, tables_text, without_lines
from tunesmith.bench.timeline import Timeline, thin
from tunesmith.errors import DeviceError, RecipeError
from tunesmith.recipe.schema import Recipe
from tunesmith.report.load import Node
from tunesmith.report.strings import Words
from tunesmith.report.timeline import timeline_svg

MakeRecipe = Callable[..., Recipe]


# torch warns of what it can't see on a CPU.
@pytest.mark.filterwarnings("ignore:.*profiler.*")
def test_profile_writes_table_trace_and_timeline(tiny_recipe: MakeRecipe, capfd: pytest.CaptureFixture[str]) -> None:
    """Also a bug: kineto's lines USDT:... about its start and stop stood among those for people."""
    result = profile(tiny_recipe(), steps=2, warmup_steps=1)
    assert "USDT" not in "".join(capfd.readouterr())
    folder = result.run_dir / "profile"
    found = json.loads((folder / "operators.json").read_text())
    assert found["by"] == "host"
    times = [row["self_host_s"] for row in found["operators"]]
    assert times == sorted(times, reverse=True)
    assert any(row["name"] in ("aten::mm", "aten::addmm") for row in found["operators"])
    assert (folder / "operators.txt").read_text().startswith("operator")
    with gzip.open(folder / "trace.json.gz", "rt") as trace:
        names = {event.get("name") for event in json.load(trace)["traceEvents"]}
    assert {"step 1", "step 2"} <= names
    memory = json.loads((folder / "memory.json").read_text())
    assert [phase for _, phase in memory["phases"]] == ["forward", "loss and backward", "optimiser"]
    assert memory["peak_bytes"] == max(held for _, held in memory["points"])
    owners = memory["owners"]
    assert memory["points"][0][1] >= owners["weights_bytes"] + owners["adapters_bytes"] + owners["optimizer_bytes"]
    svg = timeline_svg(Node(memory), Words())
    assert svg is not None
    assert svg.startswith("<svg")
    assert "xmlns" in svg


def test_kernels_have_a_table_of_their_own() -> None:
    """A bug: where blocks run as a CUDA graph, the table said _Replay and nothing of what ran in it."""
    replay = {"name": "_Replay", "calls": 2, "self_device_s": 0.4, "self_host_s": 0.0}
    kernels = [{**replay, "name": name, "self_device_s": s} for name, s in (("product", 0.3), ("norm", 0.1))]
    operators, _, below = tables_text([replay], kernels, 2, True).partition("\n\n")
    assert operators.splitlines()[1].split() == ["_Replay", "1.0", "200.000", "100.0%"]
    assert [line.split()[0] for line in below.splitlines()] == ["kernel", "product", "norm"]
    assert below.splitlines()[1].split()[1:] == ["1.0", "150.000", "75.0%"]
    assert "kernel" not in tables_text([replay], [], 2, True)


def test_other_lines_of_the_libraries_are_kept(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), without_lines(b"USDT:"):
        os.write(2, b"a first warning\nUSDT:2026 profiler_start\na last one, USDT: inside")
        raise KeyError
    os.write(2, b"\nafter")
    assert capfd.readouterr().err == "a first warning\na last one, USDT: inside\nafter"


def test_timeline_sees_a_known_allocation() -> None:
    with Timeline([], torch.device("cpu")) as timeline:
        timeline.mark("forward")
        buffer = torch.zeros(1_000_000, dtype=torch.uint8)
        timeline.mark("forward")
        del buffer
        torch.zeros(1)
    held = [size for _, size in timeline.points]
    assert max(held) >= 1_000_000
    assert held[-1] < 1_000_000
    assert len(timeline.phases) == 1


def test_thinning_keeps_the_peak_and_the_ends() -> None:
    points = [(i / 10, i % 97) for i in range(5000)]
    points[1234] = (123.4, 10_000)
    kept = thin(points, 100)
    assert len(kept) <= 102
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert (123.4, 10_000) in kept
    assert thin(points[:50], 100) == points[:50]


def test_mistakes_are_refused(tiny_recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match="at least 1"):
        profile(tiny_recipe(), steps=0)
    with pytest.raises(DeviceError, match="NVTX"):
        profile(tiny_recipe(), nvtx=True)
