"""Launchers of others, as a person types them, and several machines: two ranks with the losses of `tunesmith train`."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tunesmith.recipe.load import load_recipe
from tunesmith.rundir.io import read_json, read_jsonl
from tunesmith.rundir.layout import RunDir

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]
RECIPE = """
name: shop
model: {path: "builtin:tiny", device: cpu}
data: {train: ["builtin:shop?rows=60"], max_length: 128}
method: {kind: lora, rank: 4}
train: {max_steps: 4, micro_batch_tokens: 256, precision: float32}
log: {trackers: []}
parallel: {micro_batches: 4}
"""
DS_CONFIG = """
{ // as DeepSpeed's own tutorials write it
  "train_micro_batch_size_per_gpu": "auto",
  "gradient_accumulation_steps": "auto",
  "zero_optimization": {"stage": 3}, /* all of it */
  "bf16": {"enabled": "auto"},
}
"""
PLAIN = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
COMMANDS: dict[str, tuple[list[str], list[str], dict[str, str]]] = {
    "torchrun": (["--standalone", "--nproc-per-node", "2", "-m"], [], {}),
    "deepspeed": (
        ["--num_accelerators", "2", "--no_local_rank", "--module"],
        ["--set", "parallel.engine=deepspeed", "--set", "parallel.deepspeed_config=ds_config.json"],
        {"engine": "deepspeed"},
    ),
    "accelerate-deepspeed": (
        ["launch", "--use_deepspeed", "--zero_stage", "2", "--num_processes", "2", *PLAIN, "-m"],
        [],
        {"engine": "deepspeed", "strategy": "zero2"},
    ),
    "accelerate-fsdp": (
        ["launch", "--use_fsdp", "--fsdp_version", "2", "--num_processes", "2", *PLAIN, "-m"],
        [],
        {"engine": "native", "strategy": "zero3"},
    ),
}
"""The launcher's own words, tunesmith's after the recipe, and what the run's recipe then says of `parallel`."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("launchers")
    (path / "r.yaml").write_text(RECIPE, encoding="utf-8")
    (path / "ds_config.json").write_text(DS_CONFIG, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[float]:
    """The losses of one process."""
    _finish(_start([sys.executable, "-m", "tunesmith", *_train("alone")], folder))
    return _losses(folder / "alone")


def _train(run: str) -> list[str]:
    return ["train", "r.yaml", "--no-verify", "--run-dir", run]


def _start(command: list[str], folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _finish(process: subprocess.Popen[str]) -> str:
    try:
        said, _ = process.communicate(timeout=500)
    finally:
        process.kill()
    assert process.returncode == 0, said[-4000:]
    return said


def _losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_jsonl(RunDir(run).metrics) if row["event"] == "step"]


@pytest.mark.parametrize("name", list(COMMANDS))
def test_a_launcher_of_others(name: str, folder: Path, alone: list[float]) -> None:
    program = name.partition("-")[0]
    if importlib.util.find_spec("deepspeed") is None and "deepspeed" in name:
        pytest.skip("deepspeed is not installed")
    path = shutil.which(program, path=str(Path(sys.executable).parent))
    if path is None:
        pytest.skip(f"{program} is not installed")
    before, after, parallel = COMMANDS[name]
    _finish(_start([path, *before, "tunesmith", *_train(name), *after], folder))
    assert _losses(folder / name) == pytest.approx(alone, rel=1e-5)
    assert len(alone) == 4
    assert (folder / name / "ranks" / "rank-1").is_dir()
    settings = load_recipe(RunDir(folder / name).recipe).parallel
    assert {key: getattr(settings, key) for key in parallel} == parallel
    assert (folder / name / "final" / "adapter_model.safetensors").is_file()


@pytest.fixture
def agents(folder: Path, free_ports: Callable[[int], list[int]]) -> Iterator[Callable[[int], subprocess.Popen[str]]]:
    """Starts `tunesmith launch` as on one of two machines; whoever is left is ended."""
    (port,) = free_ports(1)
    started: list[subprocess.Popen[str]] = []

    def start(nproc: int) -> subprocess.Popen[str]:
        meeting = ["--nnodes", "2", "--rdzv", f"127.0.0.1:{port}", "--run-dir", "nodes"]
        command = [sys.executable, "-m", "tunesmith", "launch", "--cpu", "--nproc", str(nproc), *meeting]
        started.append(_start([*command, *_train("nodes")[:-2]], folder))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def test_two_machines_meet_and_train(
    agents: Callable[[int], subprocess.Popen[str]], folder: Path, alone: list[float]
) -> None:
    """Two agents on loopback, with one process and with two: ranks are numbered through, and there is one run."""
    first, second = agents(1), agents(2)
    for process in (first, second):
        _finish(process)
    run = folder / "nodes"
    assert _losses(run) == pytest.approx(alone, rel=1e-5)
    assert {path.name for path in (run / "logs").glob("rank-*.log")} == {f"rank-{rank}.log" for rank in range(3)}
    assert read_json(run / "run.json")["status"] == "finished"
