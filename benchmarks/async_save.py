"""How long training stands still while the state of a large model is saved, and whether it comes back bit for bit.

    torchrun --nproc-per-node 4 benchmarks/async_save.py --folder DIR --out FILE.json

Every process holds its rows of a 7B shape's float32 masters and two moments (91 GB in all): no model, only tensors and
matrix products that take as long as a step's. Steps run before, during and after a save; the "update" after each one
writes every tensor, behind the fence. Then the state is checked, and each process reads its part back and compares it
with the numbers it was made from. One process: leave torchrun out. On a CPU: --device cpu --layers 1 --shrink 16.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.checkpoint.agreement import Agreement, checkpoint_group
from tunesmith.checkpoint.async_saver import AsyncSaver
from tunesmith.checkpoint.shards import Shard
from tunesmith.checkpoint.state import load_latest
from tunesmith.rundir.environment import environment_fingerprint
from tunesmith.rundir.io import write_json_atomic

KINDS = ("model.{}", "optimizer.{}.exp_avg", "optimizer.{}.exp_avg_sq")


def shapes(layers: int, shrink: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The parameters of a 7B decoder, fused, each dimension divided by `shrink`."""
    hidden, mlp, vocab, fused = 3584 // shrink, 18944 // shrink, 152064 // shrink, 4608 // shrink
    yield "embedding.weight", (vocab, hidden)
    for layer in range(layers):
        block = f"blocks.{layer}"
        yield f"{block}.attention_norm.weight", (hidden,)
        yield f"{block}.attention.qkv.weight", (fused, hidden)
        yield f"{block}.attention.qkv.bias", (fused,)
        yield f"{block}.attention.output.weight", (hidden, hidden)
        yield f"{block}.mlp_norm.weight", (hidden,)
        yield f"{block}.mlp.up.weight", (2 * mlp, hidden)
        yield f"{block}.mlp.down.weight", (hidden, mlp)
    yield "norm.weight", (hidden,)
    yield "head.lm_head.weight", (vocab, hidden)


def make_shards(options: argparse.Namespace, rank: int, size: int) -> list[Shard]:
    """This process's rows of everything, with numbers that it can make again."""
    shards = []
    for name, shape in shapes(options.layers, options.shrink):
        chunk = -(-shape[0] // size)
        rows = (min(shape[0], rank * chunk), min(shape[0], (rank + 1) * chunk))
        slices = (rows, *((0, length) for length in shape[1:]))
        for kind in KINDS:
            tensor = torch.empty([stop - start for start, stop in slices], device=options.device)
            shards.append(Shard(kind.format(name), tensor, shape, slices))
    for number, shard in enumerate(shards):
        numbers(shard.tensor, number, rank)
    return shards


def numbers(tensor: Tensor, number: int, rank: int) -> Tensor:
    """Fill a tensor with what belongs there."""
    generator = torch.Generator(tensor.device).manual_seed(1000 * number + rank)
    return tensor.normal_(generator=generator)


class Steps:
    """What stands for training: products for the time of a step, then a write to every tensor."""

    def __init__(self, options: argparse.Namespace, shards: list[Shard], saver: AsyncSaver) -> None:
        self.options, self.shards, self.saver = options, shards, saver
        self.matrix = torch.randn(options.width, options.width, device=options.device).bfloat16()
        self.times_s: list[float] = []

    def run(self, count: int) -> list[float]:
        """Seconds of each step, waited for."""
        times_s = []
        for _ in range(count):
            began = time.perf_counter()
            for _ in range(self.options.products):
                torch.mm(self.matrix, self.matrix)
            self.saver.fence()
            for shard in self.shards:
                shard.tensor.neg_()  # twice is nothing: an even number of steps leaves the numbers
            self._wait()
            times_s.append(time.perf_counter() - began)
        return times_s

    def _wait(self) -> None:
        if self.options.device != "cpu":
            torch.cuda.synchronize()


def measure(options: argparse.Namespace, agreement: Agreement) -> dict[str, Any]:
    """What this process saw."""
    shards = make_shards(options, agreement.rank, agreement.world_size)
    saver = AsyncSaver(Path(options.folder), keep=1, device=options.device, agreement=agreement)
    steps = Steps(options, shards, saver)
    began = time.perf_counter()
    saver.prepare(shards)
    saver._join()
    prepare_s = time.perf_counter() - began
    rounds = []
    for number in range(1, options.saves + 1):
        before = steps.run(4)
        agreement.gather(None)
        saver.save(number, shards, {"number": number})
        during = steps.run(2)
        saved = saver.wait()
        assert saved is not None
        rounds.append({**asdict(saved), "path": saved.path.name, "steps_before_s": before, "steps_during_s": during})
    saver.close()
    began = time.perf_counter()
    state = load_latest(Path(options.folder), agreement=agreement)[1]
    verify_s = time.perf_counter() - began
    began, different = time.perf_counter(), []
    for number, shard in enumerate(shards):
        expected = numbers(torch.empty_like(shard.tensor), number, agreement.rank)
        if not torch.equal(state.stored.read(shard.name, shard.slices).to(options.device), expected):
            different.append(shard.name)
    read_s = time.perf_counter() - began
    return {
        "rank": agreement.rank,
        "tensors": len(shards),
        "prepare_s": prepare_s,
        "saves": rounds,
        "step_s": statistics.median(rounds[-1]["steps_before_s"]),
        "verify_s": verify_s,
        "read_and_compare_s": read_s,
        "different": different,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="where the state goes, with room for two; emptied afterwards")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--shrink", type=int, default=1)
    parser.add_argument("--saves", type=int, default=2)
    parser.add_argument("--width", type=int, default=8192)
    parser.add_argument("--products", type=int, default=600, help="600 of width 8192: about a second on an H200")
    options = parser.parse_args()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        torch.distributed.init_process_group("gloo")
    if options.device == "cuda":
        options.device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(options.device)
    agreement = checkpoint_group()
    own = measure(options, agreement)
    ranks = agreement.gather(own)
    if agreement.rank == 0:
        total = sum(entry["saves"][-1]["num_bytes"] for entry in ranks)
        result = {
            "schema": "tunesmith.async_save",
            "schema_version": 1,
            "total_bytes": total,
            "max_stall_s": max(save["stall_s"] for entry in ranks for save in entry["saves"]),
            "bit_exact": not any(entry["different"] for entry in ranks),
            "ranks": ranks,
            "environment": environment_fingerprint(),
        }
        write_json_atomic(options.out, result)
        print(json.dumps({key: value for key, value in result.items() if key != "environment"}))
        shutil.rmtree(options.folder, ignore_errors=True)
    agreement.gather(None)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
