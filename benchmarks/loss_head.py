"""The loss head, forward and backward, beside what others do: time, memory, and where the time goes.

    python benchmarks/loss_head.py --tokens 16384 --hidden 4096 --vocab 131072 --chunks 1024,2048,4096 --out DIR
    python benchmarks/loss_head.py --trainable --launches 2048x32,2048x16,1024x16 --out DIR

One JSON line a row, also appended to DIR/loss_head.jsonl: the median over `--runs` runs in each of `--rounds` rounds,
in which all heads take turns; the peak of allocated memory beyond hidden states and weight; loss and gradient norms,
which must agree. Rows:

- `floor`: the matrix products alone on whole logits, two for a frozen head and three for a trained one.
- `tunesmith`, for every chunk size: `products_ms` is the same pass with the elementwise kernel left out, `kernel_ms`
  that kernel alone over as many logits.
- `recomputed`: the head as any function, computed again in the backward pass.
- `torch`: F.cross_entropy over whole logits. `liger`: Liger's fused head. What is not there or does not fit says so.
- `kernel`, for every `--launches`: the kernel with so many lanes and warps a row.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.kernels import linear_cross_entropy as head
from tunesmith.kernels.cross_entropy import cross_entropy_and_grad_
from tunesmith.kernels.linear_cross_entropy import linear_cross_entropy_sum
from tunesmith.rundir.environment import environment_fingerprint
from tunesmith.train.losses import cross_entropy_sum

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
WARM_UP = 2
TOLERANCE = 0.01
Loss = Callable[[], Tensor]


class Inputs:
    """Hidden states, the head's weight and targets; logits of a model that has learnt a little."""

    def __init__(self, options: argparse.Namespace) -> None:
        device, dtype = torch.device(options.device), DTYPES[options.dtype]
        torch.manual_seed(0)
        self.hidden = torch.randn(options.tokens, options.hidden, device=device, dtype=dtype).requires_grad_()
        self.weight = torch.randn(options.vocab, options.hidden, device=device, dtype=dtype).mul_(options.hidden**-0.5)
        self.weight.requires_grad_(options.trainable)
        self.targets = torch.randint(0, options.vocab, (options.tokens,), device=device)
        self.index = torch.arange(options.tokens, device=device)
        self.device = device

    def forget(self) -> None:
        """Drop the gradients."""
        self.hidden.grad = self.weight.grad = None


def heads(inputs: Inputs, chunks: list[int]) -> Iterator[tuple[dict[str, Any], Loss]]:
    """Every head as a function that gives the sum of the losses, with the facts of its row."""
    x, w, y, index = inputs.hidden, inputs.weight, inputs.targets, inputs.index
    for chunk in chunks:
        yield {"head": "tunesmith", "chunk_tokens": chunk}, partial(linear_cross_entropy_sum, x, w, y, chunk, index)
    middle = chunks[len(chunks) // 2]
    by_function = partial(cross_entropy_sum, x, index, y, lambda h: F.linear(h, w), middle)
    yield {"head": "recomputed", "chunk_tokens": middle}, by_function
    yield {"head": "torch"}, lambda: F.cross_entropy(F.linear(x, w), y, reduction="sum")
    if importlib.util.find_spec("liger_kernel") is not None:
        functions = importlib.import_module("liger_kernel.transformers")
        liger = functions.LigerFusedLinearCrossEntropyLoss(reduction="sum")
        yield {"head": "liger"}, lambda: liger(w, x, y)


def step(inputs: Inputs, loss: Loss) -> Tensor:
    """Forward and backward pass; the loss is divided as a training step divides it."""
    inputs.forget()
    total = loss()
    (total * (1.0 / inputs.targets.numel())).backward()
    return total.detach()


def time_ms(device: torch.device, run: Callable[[], object]) -> float:
    """One run, between CUDA events or by the host's clock."""
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def median_ms(device: torch.device, runs: int, run: Callable[[], object]) -> float:
    """The median of `runs` runs after warm-up."""
    for _ in range(WARM_UP):
        run()
    return statistics.median(time_ms(device, run) for _ in range(runs))


def facts_of(inputs: Inputs, loss: Loss) -> dict[str, Any]:
    """The first step of a head: what it computed, and the memory it took."""
    on_gpu = inputs.device.type == "cuda"
    inputs.forget()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    total = step(inputs, loss)
    peak_gb = (torch.cuda.max_memory_allocated() - before) / 1e9 if on_gpu else None
    gradients = {"hidden": inputs.hidden.grad, "weight": inputs.weight.grad}
    norms = {
        f"grad_{name}_norm": float(torch.linalg.vector_norm(gradient, dtype=torch.float32))
        for name, gradient in gradients.items()
        if gradient is not None
    }
    return {"loss": float(total) / inputs.targets.numel(), **norms, "peak_gb": peak_gb}


def compare(inputs: Inputs, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for every head."""
    rows: list[dict[str, Any]] = []
    runs: dict[int, Callable[[], object]] = {}
    times: dict[int, list[float]] = {}
    for facts, loss in heads(inputs, options.chunks):
        try:
            facts |= facts_of(inputs, loss)
        except torch.cuda.OutOfMemoryError:
            facts["missing"] = "does not fit into the GPU's memory"
        else:
            runs[len(rows)], times[len(rows)] = partial(step, inputs, loss), []
        inputs.forget()
        rows.append(facts)
    for _ in range(options.rounds):
        for number, run in runs.items():
            for _ in range(WARM_UP):
                run()
            times[number] += [time_ms(inputs.device, run) for _ in range(options.runs)]
    inputs.forget()
    reference = next((dict(row) for row in rows if "loss" in row), {})
    for number, row in enumerate(rows):
        if number in times:
            row |= {"median_ms": statistics.median(times[number]), "min_ms": min(times[number])}
            row["agrees"] = all(
                abs(row[key] - value) <= TOLERANCE * abs(value)
                for key, value in reference.items()
                if key == "loss" or key.endswith("_norm")
            )
        if row["head"] == "tunesmith":
            row |= split(inputs, row["chunk_tokens"], options.runs)
        yield row
    if importlib.util.find_spec("liger_kernel") is None:
        yield {"head": "liger", "missing": "liger_kernel is not installed: pip install liger-kernel"}


def split(inputs: Inputs, chunk_tokens: int, runs: int) -> dict[str, Any]:
    """Products and elementwise kernel, each alone."""
    tokens, vocab_size = inputs.targets.numel(), len(inputs.weight)
    zeros = torch.zeros(tokens, device=inputs.device)
    loss = partial(linear_cross_entropy_sum, inputs.hidden, inputs.weight, inputs.targets, chunk_tokens, inputs.index)
    with patch.object(head, "cross_entropy_and_grad_", lambda logits, targets, scale: zeros[: len(targets)]):
        products_ms = median_ms(inputs.device, runs, lambda: step(inputs, loss))
    inputs.forget()
    num_products = 3 if inputs.weight.requires_grad else 2
    flops = num_products * 2 * tokens * vocab_size * inputs.hidden.shape[1]
    return {
        "products_ms": products_ms,
        "products_tflop_per_s": flops / products_ms / 1e9,
        **kernel(inputs, chunk_tokens, runs, nullcontext()),
    }


def kernel(inputs: Inputs, chunk_tokens: int, runs: int, launch: AbstractContextManager[object]) -> dict[str, Any]:
    """The elementwise kernel over all tokens, and the logits it moves: read once and written once."""
    tokens, vocab_size = inputs.targets.numel(), len(inputs.weight)
    logits = inputs.hidden.new_empty(min(tokens, chunk_tokens), vocab_size).detach().normal_()
    parts = inputs.targets.split(chunk_tokens)

    def run() -> None:
        for targets in parts:
            cross_entropy_and_grad_(logits[: len(targets)], targets)

    with launch:
        elapsed_ms = median_ms(inputs.device, runs, run)
    moved_bytes = 2 * tokens * vocab_size * logits.element_size()
    return {"kernel_ms": elapsed_ms, "kernel_gb_per_s": moved_bytes / elapsed_ms / 1e6}


def launches(inputs: Inputs, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for every number of lanes and warps."""
    if not options.launches or inputs.device.type != "cuda":
        return
    from tunesmith.kernels import cross_entropy_triton

    for lanes, warps in options.launches:
        launch = patch.object(cross_entropy_triton, "launch_shape", lambda _, shape=(lanes, warps): shape)
        measured = kernel(inputs, options.chunks[0], options.runs, launch)
        yield {"head": "kernel", "lanes": lanes, "warps": warps, "chunk_tokens": options.chunks[0], **measured}


def floor(inputs: Inputs, runs: int) -> dict[str, Any]:
    """The products alone, on whole logits."""
    x, w = inputs.hidden.detach(), inputs.weight.detach()

    def run() -> None:
        logits = torch.mm(x, w.t())
        torch.mm(logits, w)
        if inputs.weight.requires_grad:
            torch.mm(logits.t(), x)

    try:
        return {"head": "floor", "median_ms": median_ms(inputs.device, runs, run)}
    except torch.cuda.OutOfMemoryError:
        return {"head": "floor", "missing": "whole logits do not fit into the GPU's memory"}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=131072)
    parser.add_argument("--trainable", action="store_true", help="the head's weight gets a gradient too")
    parser.add_argument("--chunks", type=_numbers, default=[1024, 2048, 4096], help="tokens a chunk, as 1024,2048")
    parser.add_argument("--launches", type=_launches, default=[], help="lanes x warps, as 2048x32,1024x16")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, help="the folder of loss_head.jsonl, which is appended to")
    return parser.parse_args(arguments)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _launches(text: str) -> list[list[int]]:
    return [[int(number) for number in part.split("x")] for part in text.split(",")]


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and append."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    inputs = Inputs(options)
    shape = {key: getattr(options, key) for key in ("tokens", "hidden", "vocab", "trainable", "dtype", "device")}
    environment = environment_fingerprint()
    with (options.out / "loss_head.jsonl").open("a", encoding="utf-8") as file:
        for rows in (iter([floor(inputs, options.runs)]), compare(inputs, options), launches(inputs, options)):
            for row in rows:
                print(json.dumps({**row, **shape}), flush=True)
                file.write(json.dumps({**row, **shape, "environment": environment}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
