"""Kill small CPU runs with SIGKILL at random moments and look whether they go on as if nothing had happened.

    python tests/long/kill_campaign.py --kills 200 --out kills.json

A quarter of the kills fall inside a save. Every run, however often it was killed, must end with the same rows of
metrics.jsonl (losses compared bit for bit) and the same adapter as a run that was left alone. Children are forked from
a parent that has imported everything: a kill costs milliseconds, not the seconds of an interpreter's start.
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
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tunesmith.rundir.environment import git_commit
from tunesmith.rundir.io import read_jsonl, write_json_atomic
from tunesmith.train.run import train

LEFTOVER = re.compile(r"^\.step-\d+\.tmp-")
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
# Everything that has a random generator or a state: dropout, NEFTune, AdamW, a schedule, several epochs.
RECIPE = {
    "method": {"kind": "lora", "rank": 4, "dropout": 0.2},
    "data": {"format": "tokens", "max_length": 32, "max_rows": 40, "validation_fraction": 0.1},
    "train": {"epochs": 3.0, "accumulation": 2, "micro_batch_tokens": 128, "neftune_alpha": 5.0, "seed": 11},
    "checkpoint": {"every_steps": 2, "keep": 2},
    "log": {"trackers": []},
}


@dataclass
class Campaign:
    """What happened, in numbers."""

    seed: int
    kills: int = 0
    inside_a_save: int = 0
    runs: int = 0
    resumes_from_a_checkpoint: int = 0
    losses_compared: int = 0
    mismatches: list[str] = field(default_factory=list)


def fork_training(recipe: dict[str, Any], run: Path) -> int:
    """A child that trains, or goes on where a killed one stopped; exits 0 when the run is finished."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        resuming = (run / "run.json").exists()
        if not resuming:
            shutil.rmtree(run, ignore_errors=True)
        train(recipe, resume=run if resuming else None, run_dir=None if resuming else run, quiet=True)
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def wait(pid: int) -> int | None:
    """The exit code of a child, or None when it was killed."""
    _, status = os.waitpid(pid, 0)
    return None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)


def is_saving(run: Path) -> bool:
    """Whether a half-written checkpoint lies in the run directory."""
    folder = run / "checkpoints"
    return any(LEFTOVER.match(name) for name in names_in(folder))


def names_in(folder: Path) -> set[str]:
    """The names in a folder that may not be there."""
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def wait_for_save(pid: int, run: Path, skip: int) -> bool:
    """Return as soon as save number `skip` (from 0) is going on; False when the child ended before."""
    seen, inside = 0, False
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        now = is_saving(run)
        if now and not inside:
            if seen == skip:
                return True
            seen += 1
        inside = now
    return False


def outcome(run: Path) -> tuple[list[tuple[Any, ...]], str]:
    """The rows that must be equal, and the adapter's checksum."""
    rows = read_jsonl(run / "metrics.jsonl")
    names = ("event", "step", "loss", "grad_norm", "learning_rate", "validation_loss", "tokens_seen")
    kept = [tuple(row.get(name) for name in names) for row in rows]
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(run / "final" / "adapter_model.safetensors").items()):
        digest.update(name.encode() + tensor.numpy().tobytes())  # the file's header may list them in any order
    return kept, digest.hexdigest()


def kill_once(
    campaign: Campaign, generator: random.Random, recipe: dict[str, Any], run: Path, duration_s: float
) -> bool:
    """Start or resume the run and kill it. Returns whether it was killed before it finished."""
    # Aiming misses now and then: a third is aimed for, so that a quarter at least falls inside.
    wanted_inside = campaign.inside_a_save * 3 <= campaign.kills
    campaign.resumes_from_a_checkpoint += any((run / "checkpoints").glob("step-*")) if run.exists() else 0
    before = names_in(run / "checkpoints")
    pid = fork_training(recipe, run)
    if wanted_inside:
        wait_for_save(pid, run, generator.randrange(3))
        time.sleep(generator.uniform(0, 0.002))
    else:
        time.sleep(generator.uniform(0.0, duration_s))
    os.kill(pid, signal.SIGKILL)
    code = wait(pid)
    if code is not None:
        if code != 0:
            raise SystemExit(f"a run failed with exit code {code}")
        return False
    campaign.kills += 1
    campaign.inside_a_save += any(LEFTOVER.match(name) for name in names_in(run / "checkpoints") - before)
    return True


def run_campaign(kills: int, seed: int, folder: Path) -> Campaign:
    """Kill until there were `kills` kills; every run is brought to its end and compared."""
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    model = {"path": str(folder / "model"), "weights": "random", "device": "cpu"}
    recipe = {**RECIPE, "model": model, "output": str(folder)}
    reference = folder / "reference"
    # In this process: what torch imports when it is first used is then there for every child.
    train(recipe, run_dir=reference, quiet=True)
    began = time.monotonic()
    if wait(fork_training(recipe, folder / "timed")) != 0:
        raise SystemExit("a run that was left alone failed")
    duration_s = time.monotonic() - began
    expected, campaign, generator = outcome(reference), Campaign(seed), random.Random(seed)
    while campaign.kills < kills:
        run = folder / f"run-{campaign.runs}"
        campaign.runs += 1
        while campaign.kills < kills and kill_once(campaign, generator, recipe, run, duration_s):
            pass
        compare(campaign, recipe, run, expected)
        shutil.rmtree(run)
    return campaign


def compare(campaign: Campaign, recipe: dict[str, Any], run: Path, expected: tuple[list[Any], str]) -> None:
    """Bring the run to its end, and count what differs from the reference."""
    if not (run / "final").exists() and wait(fork_training(recipe, run)) != 0:
        raise SystemExit(f"the last resume of {run.name} failed")
    rows, weights = outcome(run)
    campaign.losses_compared += len(rows)
    if rows != expected[0]:
        first = next((b for a, b in zip(expected[0], rows, strict=False) if a != b), "another number of rows")
        campaign.mismatches.append(f"{run.name}: {first}")
    if weights != expected[1]:
        campaign.mismatches.append(f"{run.name}: the adapter differs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a forked child must not wait for threads that only its parent has
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        campaign = run_campaign(arguments.kills, arguments.seed, Path(folder) / "runs")
    result = {
        "schema": "tunesmith.kill_campaign",
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
