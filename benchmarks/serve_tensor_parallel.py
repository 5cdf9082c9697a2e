"""What a second GPU brings to serving: `python benchmarks/serve_tensor_parallel.py CONFIG_DIR`, on two CUDA GPUs.

    CONFIG_DIR             a model directory, or a folder with its config.json alone (--weights random, made in place)
    --sizes 1 2            processes that share the model, each with a GPU; every size and format is a fresh process
    --formats bf16 fp8     float32, bf16, fp16, fp8, int8, w8a8, int4, nf4
    --output DIR           a run directory of `tunesmith bench infer` for every size

Every format prints one JSON line: for each size the time per token of one request, tokens per second of many requests,
prompt tokens per second, seconds to start and to the first token, and bytes of weights in the first process; and how
many times better each size is than the first. Compile caches are kept between the processes, so seconds to the first
token are those of a second start. A 7B in two formats takes about four minutes; --quick takes half of each measure.

NCCL's multicast over NVLink (NVLS) is left off unless NCCL_NVLS_ENABLE says otherwise: it needs rights on the host's
switches that not every machine with two of its GPUs has.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.bench.infer.compare import InferBench, bench_infer
from tunesmith.bench.infer.workload import InferWorkload

Row = Mapping[str, Any]
MEASURES = {
    "latency": ("ttft_s", "tpot_s"),
    "throughput": ("output_tokens_per_s",),
    "prefill": ("prompt_tokens_per_s",),
    "batches": ("tpot_s",),
}


def workload(quick: bool, device: str) -> InferWorkload:
    """What is measured; on a CPU, where this is only tried out, hardly anything."""
    if device == "cpu":
        return InferWorkload(
            kinds=("latency", "throughput"), latency_tokens=(16, 8), requests=4, lengths=(8, 16), samples=1
        )
    requests, answer, prompts = (128, 128, 16) if quick else (256, 256, 32)
    return InferWorkload(requests=requests, latency_tokens=(128, answer), prefill=(prompts, 2048), samples=2)


def measured(arguments: argparse.Namespace, size: int, output: Path) -> dict[str, Row]:
    """Rows by format of one size."""
    options: dict[str, Any] = {} if size == 1 else {"tensor_parallel_size": size}
    if arguments.max_num_seqs:
        options["max_num_seqs"] = arguments.max_num_seqs
    bench = InferBench(
        model=arguments.model,
        formats=tuple(arguments.formats),
        weights=arguments.weights,
        device=arguments.device,
        workload=workload(arguments.quick, arguments.device),
        timeout_s=arguments.timeout,
        cold=False,
        options=options,
        name=f"tensor-parallel-{size}",
        command=" ".join(["python", *sys.argv]),
    )
    return {row["format"]: row for row in bench_infer(bench, run_dir=output / f"gpus-{size}").rows}


def summary(row: Row) -> dict[str, Any]:
    """Medians of a row, or why there are none."""
    if row["status"] != "ok":
        return {"status": row["status"], "reason": row["reason"]}
    found: dict[str, Any] = {"weights_bytes": row["weights_bytes"], "short": row["short"]}
    for key in ("start_s", "first_token_s"):
        found[key] = None if row[key] is None else round(row[key]["median"], 3)
    for name, values in row["measures"].items():
        kind = "batches" if name.startswith("batch-") else name
        found |= {f"{name}.{key}": values[key]["median"] for key in MEASURES[kind] if values.get(key)}
    return found


def ratios(first: Row, other: Row) -> dict[str, float]:
    """How many times better the other is: rates over the first's, times under it."""
    found = {}
    for key, value in first.items():
        if "." in key and other.get(key):
            found[key] = round(
                value / other[key] if key.endswith("_s") and "per_s" not in key else other[key] / value, 3
            )
    return found


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--formats", nargs="+", default=["bf16", "fp8"])
    parser.add_argument("--weights", choices=["random", "checkpoint"], default="random")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--max-num-seqs", type=int)
    parser.add_argument("--timeout", type=float, default=150.0, help="seconds for one process")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and say by the exit code whether everything ran."""
    arguments = parsed(argv)
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    with tempfile.TemporaryDirectory(prefix="tunesmith-shared-") as scratch:
        output = arguments.output or Path(scratch)
        found = {size: measured(arguments, size, output) for size in arguments.sizes}
    is_whole = True
    for name in arguments.formats:
        rows = {size: summary(found[size][name]) for size in arguments.sizes}
        first = rows[arguments.sizes[0]]
        better = {size: ratios(first, row) for size, row in rows.items() if row is not first}
        print(json.dumps({"format": name, "sizes": rows, "times_better": better}), flush=True)
        is_whole &= all("status" not in row for row in rows.values())
    return 0 if is_whole else 1


if __name__ == "__main__":
    sys.exit(main())
