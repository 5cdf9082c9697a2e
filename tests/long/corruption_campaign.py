"""Damage files of training states at random and look whether any damage goes unnoticed.

    python tests/long/corruption_campaign.py --corruptions 1000 --out corruptions.json

Each time three states of four writers lie there, and one thing happens to the newest: a file cut short, a bit turned
over, a range zeroed, a file removed, two files' contents exchanged, or a file's exchanged with that of the state
before. It counts as detected when a warning names the file, and what is loaded is an older state, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.checkpoint.sharded import save_shards
from tunesmith.checkpoint.shards import Shard
from tunesmith.checkpoint.state import list_states, load_latest
from tunesmith.errors import CheckpointError
from tunesmith.rundir.environment import git_commit
from tunesmith.rundir.io import write_json_atomic

STEPS, WRITERS = (10, 20, 30), 4


@dataclass
class Campaign:
    """What happened, in numbers."""

    seed: int
    corruptions: int = 0
    detected: int = 0
    by_kind: dict[str, int] = field(default_factory=dict)
    by_file: dict[str, int] = field(default_factory=dict)
    states_compared: int = 0
    silent: list[str] = field(default_factory=list)


class Threads:
    """An agreement of threads, as processes have one through a group."""

    def __init__(self, rank: int, shared: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.world_size = rank, len(shared)
        self._shared, self._barrier = shared, barrier

    def gather(self, value: Any) -> list[Any]:
        self._shared[self.rank] = json.dumps(value)
        self._barrier.wait()
        values = [json.loads(text) for text in self._shared]
        self._barrier.wait()
        return values


def tensors_of(step: int) -> dict[str, Tensor]:
    """What a state holds: weights by rows, optimiser states, what all writers have, a generator."""
    generator = torch.Generator().manual_seed(step)
    tensors = {f"model.{n}.weight": torch.randn(8, 6, generator=generator) for n in range(4)}
    tensors |= {f"optimizer.{n}.exp_avg": torch.randn(8, 6, generator=generator) for n in range(4)}
    tensors["model.norm"] = torch.ones(6) * step
    tensors["rng.torch"] = torch.randint(0, 255, (64,), dtype=torch.uint8, generator=generator)
    return tensors


def save(folder: Path, step: int) -> None:
    """One state, by several writers at once."""
    shared: list[Any] = [None] * WRITERS
    barrier = threading.Barrier(WRITERS)

    def write(rank: int) -> None:
        shards = [shard_of(name, tensor, rank) for name, tensor in tensors_of(step).items()]
        facts = {"tokens_seen": 1000 * step}
        save_shards(folder, step, shards, facts, keep=len(STEPS), agreement=Threads(rank, shared, barrier))

    threads = [threading.Thread(target=write, args=(rank,)) for rank in range(WRITERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def shard_of(name: str, tensor: Tensor, rank: int) -> Shard:
    """A writer's rows of a matrix, or all of a vector."""
    if tensor.dim() == 1:
        return Shard(name, tensor, tuple(tensor.shape), ((0, len(tensor)),))
    rows = len(tensor) // WRITERS
    first = rank * rows
    return Shard(name, tensor[first : first + rows], tuple(tensor.shape), ((first, first + rows), (0, tensor.shape[1])))


def truncate(file: Path, generator: random.Random) -> set[str]:
    """Cut the end off: a byte, or all, or anything between."""
    content = file.read_bytes()
    file.write_bytes(content[: generator.choice([0, len(content) - 1, generator.randrange(len(content))])])
    return {file.name}


def flip(file: Path, generator: random.Random) -> set[str]:
    """Turn one bit over."""
    content = bytearray(file.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    file.write_bytes(content)
    return {file.name}


def zero(file: Path, generator: random.Random) -> set[str]:
    """Zero a range, as a lost page is; not one that is zero already."""
    before = file.read_bytes()
    content = bytearray(before)
    while content == before:
        first = generator.randrange(len(content))
        last = min(len(content), first + generator.choice([1, 16, 512, 4096]))
        content[first:last] = bytes(last - first)
    file.write_bytes(content)
    return {file.name}


def delete(file: Path, _: random.Random) -> set[str]:
    """Remove it."""
    file.unlink()
    return {file.name}


def swap(file: Path, generator: random.Random) -> set[str]:
    """Exchange its content with that of another file of the state."""
    other = generator.choice([other for other in sorted(file.parent.iterdir()) if other != file])
    exchange(file, other)
    return {file.name, other.name}


def swap_between_steps(file: Path, _: random.Random) -> set[str]:
    """Exchange it with the same file of the state before."""
    exchange(file, file.parent.with_name(f"step-{STEPS[-2]:08d}") / file.name)
    return {file.name}


def exchange(one: Path, other: Path) -> None:
    """Exchange the contents of two files."""
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


KINDS: tuple[Callable[[Path, random.Random], set[str]], ...] = (truncate, flip, zero, delete, swap, swap_between_steps)
"""Each returns the files of the newest state that it damages."""


class Warnings(logging.Handler):
    """What loading says."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def corrupt_once(campaign: Campaign, generator: random.Random, whole: Path, folder: Path) -> None:
    """Damage a fresh copy and load it."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    kind = KINDS[campaign.corruptions % len(KINDS)]
    # Index and manifest are a third of the cases, though they are few among the files.
    files = sorted(path.name for path in (folder / f"step-{STEPS[-1]:08d}").iterdir())
    name = generator.choice([generator.choice(files), generator.choice(files), "state.json", "manifest.json"])
    before = contents(folder)
    touched = kind(folder / f"step-{STEPS[-1]:08d}" / name, generator)
    if contents(folder) == before:
        raise SystemExit(f"{kind.__name__} of {name} changed nothing")
    campaign.corruptions += 1
    count(campaign.by_kind, kind.__name__)
    count(campaign.by_file, name.split("-")[0])
    problem = undetected(campaign, folder, touched, damaged=2 if kind is swap_between_steps else 1)
    if problem is None:
        campaign.detected += 1
    else:
        campaign.silent.append(f"{kind.__name__} of {name}: {problem}")


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def undetected(campaign: Campaign, folder: Path, touched: set[str], damaged: int) -> str | None:
    """What is wrong with how the damage was met; None when it was named, and the last whole state used."""
    said = Warnings()
    logger = logging.getLogger("tunesmith.checkpoint.state")
    logger.addHandler(said)
    logger.propagate = False
    try:
        path, state = load_latest(folder)
    except CheckpointError as error:
        return f"nothing was loaded: {error}"
    finally:
        logger.removeHandler(said)
    expected = STEPS[-1 - damaged]
    if (state.step, path.name) != (expected, f"step-{expected:08d}"):
        return f"{path.name} was loaded as step {state.step}"
    if len(said.messages) != damaged or f"step-{STEPS[-1]:08d}" not in said.messages[0]:
        return f"it was not said: {said.messages}"
    if not is_named(said.messages[0], touched):
        return f"the file was not named: {said.messages[0]}"
    campaign.states_compared += 1
    for key, tensor in tensors_of(expected).items():
        if not torch.equal(state.tensors[key], tensor):
            return f"{key} is not what was saved"
    return None


def is_named(message: str, touched: set[str]) -> bool:
    """Whether the message names what was damaged: every file, or the manifest, without which no other can be told."""
    if all(name in message for name in touched) or ("manifest.json" in touched and "manifest.json" in message):
        return True
    # Another state's manifest is whole: what it can tell is that nothing here is what it lists.
    return touched == {"manifest.json"} and message.count("SHA-256") + message.count(" bytes, not ") >= 2


def count(counts: dict[str, int], key: str) -> None:
    """One more."""
    counts[key] = counts.get(key, 0) + 1


def run_campaign(corruptions: int, seed: int, folder: Path) -> Campaign:
    """Save once, damage often."""
    for step in STEPS:
        save(folder / "whole", step)
    if len(list_states(folder / "whole")) != len(STEPS):
        raise SystemExit("the states were not written")
    campaign, generator = Campaign(seed), random.Random(seed)
    while campaign.corruptions < corruptions:
        corrupt_once(campaign, generator, folder / "whole", folder / "damaged")
    return campaign


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corruptions", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        campaign = run_campaign(arguments.corruptions, arguments.seed, Path(folder))
    result = {
        "schema": "tunesmith.corruption_campaign",
        "schema_version": 1,
        "git": git_commit(),
        "passed": not campaign.silent,
        "duration_s": time.monotonic() - began,
        **asdict(campaign),
    }
    write_json_atomic(arguments.out, result)
    print(json.dumps(result))
    sys.exit(0 if result["passed"] else 1)


if __name__ == "__main__":
    main()
