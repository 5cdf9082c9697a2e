"""Kill random ranks of small CPU runs with SIGKILL at random moments; the launcher starts the group again by itself.

    python tests/long/rank_kill_campaign.py --kills 50 --ranks 4 --out rank-kills.json

Several kills hit one run, one after another, each some time after the group has come up again. Every run must end with
the rows of metrics.jsonl (losses compared bit for bit) and the weights of a run that was left alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file

from tunesmith.rundir.environment import git_commit
from tunesmith.rundir.io import read_jsonl, write_json_atomic

CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}
RECIPE: dict[str, Any] = {
    "method": {"kind": "lora", "rank": 4, "dropout": 0.2},
    "data": {"format": "tokens", "max_length": 32, "max_rows": 320, "validation_fraction": 0.1},
    "train": {"micro_batch_tokens": 128, "neftune_alpha": 5.0, "seed": 11},
    "checkpoint": {"every_steps": 10, "keep": 2},
    "log": {"trackers": []},
}
KILLS_OF_A_RUN = 5
Moment = Callable[[Path, Any], None]
"""Waits for the moment of a kill: of a run in this directory, by this process."""
_START = re.compile(r"start (\d+), process (\d+)")


@dataclass
class Campaign:
    """What happened, in numbers."""

    seed: int
    ranks: int
    kills: int = 0
    runs: int = 0
    restarts: int = 0
    resumes_from_a_checkpoint: int = 0
    losses_compared: int = 0
    mismatches: list[str] = field(default_factory=list)


def launch(recipe: Path, run: Path, ranks: int, restarts: int) -> subprocess.Popen[str]:
    """A launch that is under way; its output goes to a file beside the run."""
    options = ["--cpu", "--nproc", str(ranks), "--max-restarts", str(restarts), "--run-dir", str(run)]
    command = [sys.executable, "-m", "tunesmith", "launch", *options, "train", str(recipe), "--no-verify"]
    with run.with_suffix(".out").open("w") as out:
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, text=True)


def newest_start(run: Path, rank: int) -> tuple[int, int]:
    """(number, process id) of a rank's newest start, by its log; (0, 0) before there is one."""
    path = run / "logs" / f"rank-{rank}.log"
    found = _START.findall(path.read_text(encoding="utf-8", errors="replace")) if path.exists() else []
    return (int(found[-1][0]), int(found[-1][1])) if found else (0, 0)


def by_clock(generator: random.Random, pace_s: float) -> Moment:
    """Some time after the start."""
    return lambda run, process: time.sleep(generator.uniform(0.0, pace_s))


def by_steps(generator: random.Random, fewest: int, most: int) -> Moment:
    """Some steps after the last one that any start has reached: however fast the machine, the run has not ended."""

    def moment(run: Path, process: Any) -> None:
        until = _steps_done(run) + generator.randint(fewest, most)
        while process.poll() is None and _steps_done(run) < until:
            time.sleep(0.02)

    return moment


def _steps_done(run: Path) -> int:
    path = run / "metrics.jsonl"
    steps = re.findall(r'"step": ?(\d+)', path.read_text(encoding="utf-8")) if path.exists() else []
    return max(map(int, steps), default=0)


def kill_some(
    campaign: Campaign, generator: random.Random, process: Any, run: Path, wanted: int, moment: Moment
) -> None:
    """Kill `wanted` times, each time a random rank at a moment after the newest start; stops when the run ends."""
    seen = 0
    while wanted and process.poll() is None:
        starts = [newest_start(run, rank) for rank in range(campaign.ranks)]
        if min(number for number, _ in starts) <= seen:
            time.sleep(0.05)
            continue
        seen = min(number for number, _ in starts)
        moment(run, process)
        if process.poll() is not None:
            return
        had_checkpoint = any((run / "checkpoints").glob("step-*"))
        try:
            os.kill(starts[generator.randrange(campaign.ranks)][1], signal.SIGKILL)
        except ProcessLookupError:
            continue
        wanted -= 1
        campaign.kills += 1
        campaign.resumes_from_a_checkpoint += had_checkpoint


def outcome(run: Path) -> tuple[list[tuple[Any, ...]], str]:
    """The rows that must be equal, and the adapter's checksum."""
    names = ("event", "step", "loss", "grad_norm", "learning_rate", "validation_loss", "tokens_seen")
    rows = [tuple(row.get(name) for name in names) for row in read_jsonl(run / "metrics.jsonl")]
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(run / "final" / "adapter_model.safetensors").items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return rows, digest.hexdigest()


def finish(process: subprocess.Popen[str], run: Path) -> None:
    """Wait for a launch to end well. Raises: SystemExit with what it printed."""
    code = process.wait(timeout=1800)
    if code != 0:
        raise SystemExit(f"{run.name} ended with exit code {code}:\n{run.with_suffix('.out').read_text()}")


def run_campaign(
    kills: int,
    ranks: int,
    seed: int,
    steps: int,
    folder: Path,
    undisturbed: Callable[[Path, Path], None] | None = None,
    moment: Moment | None = None,
) -> Campaign:
    """Kill until there were `kills` kills; every run is compared with one that was left alone.

    undisturbed: makes that run, of a recipe and a run directory; without it, it is launched as the others are.
    moment: of the kills; without it, by the clock, within most of the time that the undisturbed run took.
    """
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    model = {"path": str(folder / "model"), "weights": "random", "device": "cpu"}
    recipe = folder / "recipe.yaml"
    train = {**RECIPE["train"], "max_steps": steps}
    recipe.write_text(yaml.safe_dump({**RECIPE, "train": train, "model": model}), encoding="utf-8")
    began = time.monotonic()
    if undisturbed is None:
        finish(launch(recipe, folder / "reference", ranks, 0), folder / "reference")
    else:
        undisturbed(recipe, folder / "reference")
    campaign, generator = Campaign(seed, ranks), random.Random(seed)
    moment = moment or by_clock(generator, 0.7 * (time.monotonic() - began))
    expected = outcome(folder / "reference")
    while campaign.kills < kills:
        run = folder / f"run-{campaign.runs}"
        campaign.runs += 1
        wanted = min(KILLS_OF_A_RUN, kills - campaign.kills)
        process = launch(recipe, run, ranks, wanted)
        try:
            kill_some(campaign, generator, process, run, wanted, moment)
            finish(process, run)
        finally:
            process.kill()
        campaign.restarts += run.with_suffix(".out").read_text().count("starting all again")
        compare(campaign, run, expected)
        shutil.rmtree(run)
    return campaign


def compare(campaign: Campaign, run: Path, expected: tuple[list[Any], str]) -> None:
    """Count what differs from the run that was left alone."""
    rows, weights = outcome(run)
    campaign.losses_compared += len(rows)
    if rows != expected[0]:
        first = next((b for a, b in zip(expected[0], rows, strict=False) if a != b), "another number of rows")
        campaign.mismatches.append(f"{run.name}: {first}")
    if weights != expected[1]:
        campaign.mismatches.append(f"{run.name}: the adapter differs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400, help="of every run; a checkpoint every ten")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        campaign = run_campaign(
            arguments.kills, arguments.ranks, arguments.seed, arguments.steps, Path(folder) / "runs"
        )
    result = {
        "schema": "tunesmith.rank_kill_campaign",
        "schema_version": 1,
        "git": git_commit(),
        "passed": not campaign.mismatches,
        "duration_s": time.monotonic() - began,
        **asdict(campaign),
    }
    write_json_atomic(arguments.out, result)
    print(json.dumps(result))
    sys.exit(0 if result["passed"] else 1)


if __name__ == "__main__":
    main()
