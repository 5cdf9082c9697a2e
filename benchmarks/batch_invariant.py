"""What the batch-invariant mode costs: the same requests with it off and on, in turn, two engines in one process.

    OMP_NUM_THREADS=1 python benchmarks/batch_invariant.py builtin:tiny --out DIR                          # a CPU
    python benchmarks/batch_invariant.py recipes/configs/qwen3-0.6b --random --dtype bfloat16 --out DIR    # a GPU

On a CPU the time is the process's CPU time, which a busy machine changes little; on a GPU it is the clock's. Greedy
answers of a set length; a row a measure: the median of the rounds, and how much longer it takes with the mode on.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tunesmith import LLM
from tunesmith.checkpoint.inference import load_for_inference
from tunesmith.engine.request import SamplingParams
from tunesmith.rundir.environment import environment_fingerprint
from tunesmith.rundir.io import write_json_atomic

MEASURES = {"decode, 1 request": (1, 16, 32), "decode, 16 requests": (16, 16, 32), "prompts, 2 x 256": (2, 256, 1)}
"""Requests, tokens of each prompt, tokens of each answer."""


def seconds_of(llm: LLM, num: int, num_in: int, num_out: int, seed: int, clock: Callable[[], float]) -> float:
    """Seconds that these requests take; prompts that no cache knows."""
    draw = random.Random(seed)
    prompts = [[draw.randrange(3, 250) for _ in range(num_in)] for _ in range(num)]
    began = clock()
    llm.generate(prompts, SamplingParams(max_tokens=num_out, temperature=0.0, ignore_eos=True), progress=False)
    return clock() - began


def measure(engines: dict[str, LLM], rounds: int, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """A row a measure; the engines take turns, and the first round is not counted."""
    rows = []
    for name, (num, num_in, num_out) in MEASURES.items():
        taken: dict[str, list[float]] = {mode: [] for mode in engines}
        for number in range(rounds + 1):
            for mode, llm in engines.items():
                seconds = seconds_of(llm, num, num_in, num_out, number, clock)
                if number:
                    taken[mode].append(seconds)
        tokens = num * (num_out if num_out > 1 else num_in)
        times = {mode: statistics.median(values) for mode, values in taken.items()}
        ratios = [on / off for off, on in zip(taken["off"], taken["on"], strict=True)]
        spread = {"ratio": times["on"] / times["off"], "ratio_least": min(ratios), "ratio_most": max(ratios)}
        rows.append({"measure": name, "tokens": tokens, "off_s": times["off"], "on_s": times["on"], **spread})
    return rows


def engine(asked: argparse.Namespace, is_invariant: bool, more: dict[str, Any]) -> LLM:
    """One of the two engines."""
    where = {"device": asked.device, "dtype": asked.dtype}
    if not asked.random:
        return LLM(asked.model, batch_invariant=is_invariant, **where, **more)
    model = load_for_inference(asked.model, weights="random", one_head=is_invariant, **where)
    return LLM(model, batch_invariant=is_invariant, **more)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="a model, or with --random a folder with a config.json")
    parser.add_argument("--out", type=Path, required=True, help="a folder for batch_invariant.json")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--random", action="store_true", help="random weights of this shape")
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    more: dict[str, Any] = {"max_num_seqs": 16, "max_model_len": 1024, "gpu_memory_utilization": 0.4}
    engines = {mode: engine(asked, mode == "on", more) for mode in ("off", "on")}
    on_gpu = engines["off"].runner.device.type == "cuda"
    rows = measure(engines, asked.rounds, time.perf_counter if on_gpu else time.process_time)
    for row in rows:
        off, on = (1000 * row[mode] / row["tokens"] for mode in ("off_s", "on_s"))
        print(f"{row['measure']:20s} off {off:8.3f} on {on:8.3f} ms a token: {row['ratio']:.2f} times")
    result = {
        "schema": "tunesmith.batch_invariant", "schema_version": 1, "model": asked.model, "rounds": asked.rounds,
        "clock": "wall" if on_gpu else "cpu", "threads": torch.get_num_threads(), "rows": rows,
        "load_average": os.getloadavg()[0], "environment": environment_fingerprint(),
    }  # fmt: skip
    asked.out.mkdir(parents=True, exist_ok=True)
    write_json_atomic(asked.out / "batch_invariant.json", result)


if __name__ == "__main__":
    main()
