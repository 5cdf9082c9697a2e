"""Where the time of many requests at once goes, step by step: `python benchmarks/step_log.py CONFIG_DIR`.

    CONFIG_DIR            a model directory, or a folder with its config.json alone: weights are random, made in place
    --quantize fp8        a weight format of `tunesmith.LLM(quantize=...)`
    --requests 256        prompts and answers of `tunesmith bench infer`: lengths uniform in --lengths, the same ids
    --prefill 32x2048     the same for prompts alone, one token out, afterwards
    --steps FILE          every step as a line of JSON

Prints JSON lines. `start`: seconds to make and warm up. `run`: a workload's seconds, tokens a second, and the kernels
that Triton compiled meanwhile: there should be none. `steps`: steps of a kind, decoding ones by how many requests they
had (the bucket's largest), their number, tokens, seconds in all, median and longest ms, and how much of the time the
host waited for the device: where it waits for little, the host is what is slow. `slow`: the steps that took most of a
second of their own beyond their bucket's median, with every phase (engine/step_clock.py).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunesmith.bench.infer.ours import Ours
from tunesmith.bench.infer.workload import InferWorkload, make_job_measures
from tunesmith.engine.step_clock import SlowStep, StepClock

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 160, 192, 224, 256)
SHOWN = 6


class AllSteps(StepClock):
    """Keeps every step."""

    def clear(self) -> None:
        """See StepClock."""
        super().clear()
        self.steps: list[SlowStep] = []

    def end(self) -> float:
        """See StepClock."""
        spent = self._spent_s
        seconds = super().end()
        phases = {name: round(1000 * phase, 3) for name, phase in spent.items()}
        self.steps.append(SlowStep(seconds, self._number, *self._launched, 0, phases))
        return seconds


def bucket(step: SlowStep) -> str:
    """What a step is counted with."""
    if step.kind != "decode":
        return step.kind
    return f"decode {next((most for most in BUCKETS if step.num_requests <= most), step.num_requests)}"


def compiled() -> dict[str, int]:
    """Kernels in Triton's cache, and how many forms of each."""
    found: dict[str, int] = defaultdict(int)
    for path in Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton" / "cache")).glob("*/*.cubin"):
        found[path.stem] += 1
    return found


def summary(steps: list[SlowStep]) -> Iterator[dict[str, Any]]:
    """A line for each bucket, and the steps that took longest beyond theirs."""
    buckets: dict[str, list[SlowStep]] = defaultdict(list)
    for step in steps:
        buckets[bucket(step)].append(step)
    medians = {name: statistics.median(step.seconds for step in found) for name, found in buckets.items()}
    for name, found in sorted(buckets.items(), key=lambda item: -sum(step.seconds for step in item[1])):
        waited = sum(step.phases_ms.get("wait", 0.0) for step in found) / 1000
        whole = sum(step.seconds for step in found)
        yield {
            "steps": name,
            "number": len(found),
            "tokens": sum(step.num_tokens for step in found),
            "seconds": round(whole, 4),
            "median_ms": round(1000 * medians[name], 3),
            "longest_ms": round(1000 * max(step.seconds for step in found), 3),
            "waited": round(waited / whole, 3),
        }
    late = sorted(steps, key=lambda step: medians[bucket(step)] - step.seconds)[:SHOWN]
    for step in late:
        yield {"slow": as_line(step), "beyond_ms": round(1000 * (step.seconds - medians[bucket(step)]), 3)}


def as_line(step: SlowStep) -> dict[str, Any]:
    """A step in JSON."""
    shape = {"kind": step.kind, "requests": step.num_requests, "tokens": step.num_tokens}
    return {"number": step.number, "ms": round(1000 * step.seconds, 3), **shape, **step.phases_ms}


def main() -> int:
    """Measure. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--quantize", default="bf16", help="a format of `tunesmith bench infer`")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--lengths", default="100..1024")
    parser.add_argument("--prefill", default="32x2048")
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--options", default="{}", help="JSON: keywords of tunesmith.LLM")
    parser.add_argument("--steps", type=Path)
    given = parser.parse_args()
    low, high = (int(part) for part in given.lengths.split(".."))
    count, length = (int(part) for part in given.prefill.split("x"))
    workload = InferWorkload(
        kinds=("throughput", "prefill"), requests=given.requests, lengths=(low, high), prefill=(count, length)
    )
    vocabulary = json.loads((given.config / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    began = time.perf_counter()
    ours = Ours(
        {
            "model": str(given.config),
            "weights": "random",
            "format": given.quantize,
            "device": given.device,
            "threads": os.cpu_count() or 1,
            "temperature": 0.6,
            "max_model_len": given.max_model_len,
            "options": json.loads(given.options),
        }
    )
    clock = ours._engine.clock = AllSteps()
    job = make_job_measures(workload, vocabulary)
    ours.generate([job["first_prompt"]], [1])
    print(json.dumps({"start": round(time.perf_counter() - began, 3)}), flush=True)
    for measure in job["measures"]:
        ours.generate(measure["warm_up"], [1] * len(measure["warm_up"]))
        sample, before = measure["samples"][0], compiled()
        clock.clear()
        began = time.perf_counter()
        tokens = sum(ours.generate(sample["prompts"], sample["outputs"]))
        seconds = time.perf_counter() - began
        late = {name: number - before.get(name, 0) for name, number in compiled().items()}
        line = {
            "run": measure["name"],
            "seconds": round(seconds, 4),
            "output_tokens_per_s": round(tokens / seconds, 1),
            "prompt_tokens_per_s": round(sum(map(len, sample["prompts"])) / seconds, 1),
            "compiled": {name: number for name, number in late.items() if number},
        }
        print(json.dumps(line), flush=True)
        for row in summary(clock.steps):
            print(json.dumps(row), flush=True)
        if given.steps is not None:
            with given.steps.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"run": measure["name"], **as_line(step)}) + "\n" for step in clock.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
